"""The cache among the inputs of a call, its name there, and how many rows the inputs have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from gralora_fx.format.input_names import PAST


class CacheLayout(Enum):
    """What a model keeps between its steps.

    Attributes:
        NONE: Nothing.
        DECODER: What a decoder keeps of its positions, by layer: keys and values, or states.
        ENCODER_DECODER: Those of the decoder's positions, and those of the encoder's output.
    """

    NONE = "none"
    DECODER = "decoder"
    ENCODER_DECODER = "encoder-decoder"


def cache_layout(inputs: Mapping[str, Any]) -> CacheLayout:
    """Return the layout of the cache among some inputs."""
    cache = inputs.get(PAST)
    if isinstance(cache, EncoderDecoderCache):
        return CacheLayout.ENCODER_DECODER
    return CacheLayout.DECODER if isinstance(cache, DynamicCache) else CacheLayout.NONE


def batch_of(values: Iterable[Any]) -> int:
    """Return the number of rows of the first tensor."""
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim > 0), 1)


def by_own_names(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name the inputs of a step as a forward's own arguments.

    transformers' newer name of the cache is `cache`. Most models take the older one too; some would not see it.
    """
    taken = inspect.signature(forward).parameters
    if PAST not in inputs or PAST in taken or "cache" not in taken:
        return inputs
    return {"cache" if name == PAST else name: value for name, value in inputs.items()}
