"""The inputs of images: pixels, and what images put beside the ids of a decoder's step. A new one is a line here."""

from __future__ import annotations

from gralora_fx.format.input_names import EMBEDS, StepInput

IMAGES = "pixel_values"
GRID, FEATURES = "grid_position_ids", "deepstack_embeds"
MAIN_INPUTS = (IMAGES,)
INPUT_AXES = {IMAGES: ("batch_size", "num_channels", "height", "width")}
STEP_INPUTS = (
    StepInput(EMBEDS),  # [batch, length, hidden], read where an id is `GIVEN`
    # [3, batch, length], the positions in time, height and width; where negative, `position_ids`
    StepInput(GRID, -1, axis=1),
    StepInput(FEATURES, axis=1),  # [layers, batch, length, hidden], added after each of the first layers
    # [batch, past + length], 1 in an image, whose tokens all see each other
    StepInput("token_type_ids", follows="attention_mask"),
    StepInput("mm_token_type_ids", follows="attention_mask"),  # Gemma 4's name for it
)
