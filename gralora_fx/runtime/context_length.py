"""The context length of a model, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNLIMITED = 2048  # positions of a decoder whose configuration names no limit, for a cache of some size
# fields of configurations for the number of positions
CONTEXT_FIELDS = (
    "max_position_embeddings",
    "max_target_positions",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)
_READ_BY = {  # an encoder-decoder's inputs, whose relative positions (T5's `n_positions`) set no limit
    "input_ids": ("max_position_embeddings", "max_encoder_position_embeddings"),
    "decoder_input_ids": ("max_position_embeddings", "max_decoder_position_embeddings", "max_target_positions"),
}


def context_length(config: Mapping[str, Any], name: str = "input_ids") -> int | None:
    """The number of positions in a configuration, or None if it names none.

    Args:
        config: A configuration's fields, as in `config.json`.
        name: The input whose positions are counted; in an encoder-decoder each has its own.
    """
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) else config
    names = _READ_BY.get(name, ()) if config.get("is_encoder_decoder") else CONTEXT_FIELDS
    sizes = [size for field in names if type(size := fields.get(field)) is int and size > 0]
    return min(sizes, default=None)
