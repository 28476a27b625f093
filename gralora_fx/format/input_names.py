"""The names of inputs that more than one stage knows, as transformers and exports have them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

IDS, EMBEDS = "input_ids", "inputs_embeds"
GIVEN = -1  # the id of a token whose embedding is given
# what images put beside the ids of a decoder's step, each described in `IMAGE_INPUTS`
IMAGE_INPUT_NAMES = (EMBEDS, "grid_position_ids", "deepstack_embeds", "token_type_ids", "mm_token_type_ids")
IMAGES = "pixel_values"
PAST = "past_key_values"
PAST_PREFIX, PRESENT_PREFIX = f"{PAST}.", "present."  # of the tensors of a cache in an export
TEXT_INPUTS = (IDS, "attention_mask", "token_type_ids", "position_ids", EMBEDS)
LABELS = ("labels", "start_positions", "end_positions")
ITEM_COUNT = "num_items_in_batch"  # by which a loss over accumulated batches is divided
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


def takes_images(inputs: Mapping[str, Any]) -> bool:
    """Return whether images `[batch, channels, height, width]` are among the inputs."""
    return getattr(inputs.get(IMAGES), "ndim", 0) == 4


def takes_image_inputs(inputs: Collection[str]) -> bool:
    """Return whether a decoder's step takes embeddings beside ids."""
    return EMBEDS in inputs and IDS in inputs


def split_labels(inputs: Mapping[str, Any], traced: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split inputs into those without labels, and the labels."""
    outside = [name for name in LABELS if name not in traced]
    labels = {name: inputs[name] for name in outside if inputs.get(name) is not None}
    return {name: value for name, value in inputs.items() if name not in outside}, labels
