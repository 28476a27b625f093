"""Example inputs of an encoder-decoder with a cache: the encoder's inputs, and one step of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel

from gralora_fx.errors import TraceError, first_line
from gralora_fx.tracing.inputs.decoder_cache import PAST, decoder_cache, pairs_of, returned_cache

_PAST, _LENGTH = 6, 3


def decoder_step(
    model: PreTrainedModel, source: Mapping[str, Tensor], *, past: int = _PAST, length: int = _LENGTH
) -> dict[str, Any]:
    """Inputs of one call: the encoder's inputs, and `length` new decoder positions after `past` cached ones.

    The cache holds the decoder's own keys and values. Those of the encoder's output are computed in every call of a
    trace, which holds encoder and decoder in one graph; an export splits the two and caches them.

    Args:
        model: An encoder-decoder.
        source: Inputs of its encoder by name.
        past: Number of cached positions; 0 for an empty cache.
        length: Number of new positions.

    Returns:
        The source, `decoder_input_ids [batch, length]` and an `EncoderDecoderCache` with keys and values
        `[batch, heads, past, size]` a layer.

    Raises:
        TraceError: The model has no such cache.
    """
    generator = torch.Generator().manual_seed(0)
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", 100)
    batch, cached = next(iter(source.values())).shape[0], max(past, 1)
    ids = torch.randint(min(3, size - 1), size, (batch, cached + length), generator=generator)
    try:
        with torch.no_grad():
            cache = returned_cache(model(**source, decoder_input_ids=ids[:, :cached], use_cache=True))
        layers = pairs_of(cache)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TraceError(f"{type(model).__name__} keeps no cache of keys and values ({first_line(error)})") from error
    if not isinstance(cache, EncoderDecoderCache):
        raise TraceError(f"{type(model).__name__} keeps a {type(cache).__name__}; an EncoderDecoderCache is needed")
    cut = [[tensor[:, :, :past].contiguous() for tensor in pair] for pair in layers]
    return {**source, "decoder_input_ids": ids[:, cached:], PAST: decoder_cache(cut)}


def other_step_sizes(model: PreTrainedModel, sample: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls of other sizes: one row and one position after a long past, and a longer source with an empty cache.

    Args:
        model: An encoder-decoder.
        sample: The inputs it was traced with.
    """
    source = {name: value for name, value in sample.items() if name not in ("decoder_input_ids", PAST)}
    first = {name: value[:1] for name, value in source.items()}
    yield "one row and one position", decoder_step(model, first, past=9, length=1)
    longer = {
        name: torch.cat([value, value[:, :2]], dim=1) if value.ndim == 2 else value for name, value in source.items()
    }
    more = {name: torch.cat([value, value[:1]]) for name, value in longer.items()}
    yield "an empty cache", decoder_step(model, more, past=0, length=5)
