"""The inputs and the tasks of models that read images; a new input of a step is a line here."""

from __future__ import annotations

from typing import Any

from gralora_fx.format.input_names import EMBEDS, IDS, StepInput
from gralora_fx.format.tasks import Task

IMAGES = "pixel_values"
GRID, FEATURES = "grid_position_ids", "deepstack_embeds"
PREFIX = "prefix_type_ids"  # 1 in a prompt whose tokens all see each other
GRID_THW = "image_grid_thw"  # of an image's patches: frames, height, width
IMAGE_SIZES = "image_sizes"  # of a processor: height and width of each image, which it has padded
PIXEL_MASK = "pixel_attention_mask"  # of a processor: which pixels are not padding
BATCH_IMAGES = "batch_num_images"  # of a processor that cuts the only image of a prompt alone
PATCH_PLACES = "image_position_ids"  # column and row of each patch, -1 of padding
# of images that layers of their own attend to: keys and values of each layer, and what each token sees of the tiles of
# each set of images: 1 is seen, 0 is not, -1 is not of this row
KEYS, VALUES, SEEN = "image_keys", "image_values", "image_mask"
TILES, ASPECT = "image_tiles", "aspect_ratio_ids"  # which tiles of an image are not padding; its aspect ratio
GIVEN_PLACES = "given_places"  # of a row: which of its first tokens are not those of the ids
VISION_ENCODER = "vision_encoder"  # the file of the vision encoder, without its suffix
IMAGE_FEATURES, DEEPSTACK = "image_features", "deepstack_features"  # its outputs
NEWLINE = "image_newline"  # another, of models that lay out tiles: what ends a line
MAIN_INPUTS = (IMAGES,)
INPUT_AXES = {
    IMAGES: ("batch_size", "num_channels", "height", "width"),
    KEYS: ("layers", "image_sets", "heads", "size", "tiles"),
    SEEN: ("batch_size", "sequence_length", "image_sets", "tiles"),
}
STEP_INPUTS = (
    StepInput(EMBEDS),  # [batch, length, hidden], read where an id is `GIVEN`
    # [3, batch, length], the positions in time, height and width; where negative, `position_ids`
    StepInput(GRID, -1, axis=1),
    StepInput(FEATURES, axis=1),  # [layers, batch, length, hidden], added after each of the first layers
    # [batch, past + length], 1 in an image, whose tokens all see each other
    StepInput("token_type_ids", follows="attention_mask"),
    StepInput("mm_token_type_ids", follows="attention_mask"),  # Gemma 4's name for it
    StepInput(PREFIX, follows="attention_mask"),
    StepInput(KEYS, axis=None, others=(1, 4)),  # [layers, sets, heads, size, tiles, patches]
    StepInput(VALUES, axis=None, others=(1, 3)),  # [layers, sets, heads, tiles, patches, size]
    StepInput(SEEN, -1, others=(2, 3)),  # [batch, length, sets, tiles]
)
CLASSIFICATION = "image-classification"
TO_TEXT = "image-to-text"


def reads_images(model: Any) -> bool:
    """Return whether a model has a part that reads images beside one of texts."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    return getattr(model.config, "vision_config", None) is not None and model.config.get_text_config() != model.config


TASKS = (
    Task(
        "image-text-to-text",
        "AutoModelForImageTextToText",
        cache="decoder",
        adapters=("CAUSAL_LM",),
        takes_embeddings=True,
        is_of=lambda model: reads_images(model) and not model.config.is_encoder_decoder,
    ),
    Task(
        TO_TEXT,
        "AutoModelForImageTextToText",
        ("VisionEncoderDecoderModel",),
        inputs=(IMAGES, IDS),
        cache="encoder-decoder",
        adapters=("SEQ_2_SEQ_LM",),
        takes_embeddings=True,
        is_of=lambda model: reads_images(model) and model.config.is_encoder_decoder,
        example="images='line.png'",
        example_options={"image": "FILE.png"},
    ),
    Task(
        CLASSIFICATION,
        "AutoModelForImageClassification",
        ("ForImageClassification",),
        inputs=(IMAGES,),
        adapters=("SEQ_CLS",),
        is_classification=True,
    ),
)
