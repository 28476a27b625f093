"""Example inputs of a model with a cache: one step of a decoder, with ids, mask, positions, past keys and values.

Of an encoder-decoder they are the encoder's inputs too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from gralora_fx.compat.torch_graphs import tree_map_only
from gralora_fx.errors import TraceError, first_line
from gralora_fx.progress.stages import quiet

if TYPE_CHECKING:  # imports much that serving does not need
    from transformers import PreTrainedModel

PAST = "past_key_values"


class CacheLayout(Enum):
    """What a model keeps between its steps.

    Attributes:
        NONE: Nothing.
        DECODER: Keys and values of a decoder's positions, by layer.
        ENCODER_DECODER: Those of the decoder's positions, and those of the encoder's output.
    """

    NONE = "none"
    DECODER = "decoder"
    ENCODER_DECODER = "encoder-decoder"


def cache_layout(inputs: Mapping[str, Any]) -> CacheLayout:
    """The layout of the cache among some inputs."""
    cache = inputs.get(PAST)
    if isinstance(cache, EncoderDecoderCache):
        return CacheLayout.ENCODER_DECODER
    return CacheLayout.DECODER if isinstance(cache, DynamicCache) else CacheLayout.NONE


_BATCH, _PAST, _LENGTH = 2, 6, 3


def cached_inputs(
    model: PreTrainedModel, *, batch: int = _BATCH, past: int = _PAST, length: int = _LENGTH
) -> dict[str, Any]:
    """Inputs of one step: `length` new positions after `past` cached ones, one row padded on the left.

    Args:
        model: A decoder.
        batch: Number of rows.
        past: Number of cached positions; 0 for an empty cache.
        length: Number of new positions.

    Returns:
        `input_ids [batch, length]`, `attention_mask [batch, past + length]`, `position_ids [batch, length]` where the
        model takes them, and a `DynamicCache` with keys and values `[batch, key heads, past, size]` a layer.

    Raises:
        TraceError: The model has no such cache.
    """
    generator = torch.Generator().manual_seed(0)
    size = getattr(model.config.get_text_config(), "vocab_size", 100)
    ids = torch.randint(min(3, size - 1), size, (batch, max(past, 1) + length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1 and past > 1:
        mask[-1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = positions(mask)
    cached = max(past, 1)
    first = {name: value[:, :cached] for name, value in inputs.items()}
    _, layers = _computed_cache(model, {**first, PAST: DynamicCache()})
    skip = cached - past  # an empty cache is made from one of one position, sliced
    step = {name: value[:, cached:] for name, value in inputs.items()}
    step["attention_mask"] = mask[:, skip:]
    return {**step, PAST: cache_of([(key[:, :, : past or 0], value[:, :, : past or 0]) for key, value in layers])}


def _computed_cache(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> tuple[Cache | None, list[tuple[Tensor, Tensor]]]:
    """The cache that a model returns for some inputs, and the decoder's own keys and values in it, by layer.

    Raises:
        TraceError: It has no such cache.
    """
    try:
        with torch.no_grad(), quiet():
            cache: Any = returned_cache(model(**inputs, use_cache=True))
        return cache, pairs_of(cache)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise TraceError(f"{type(model).__name__} keeps no cache of keys and values ({first_line(error)})") from error


def cache_of(layers: Iterable[Sequence[Tensor]]) -> DynamicCache:
    """A cache of keys and values, by layer."""
    cache = DynamicCache()
    for index, (key, value) in enumerate(layers):
        cache.update(key, value, index)
    return cache


def returned_cache(outputs: Any) -> Cache | None:
    """The cache among a model's outputs, whose name there differs between versions of transformers; None if none is."""
    values = outputs.values() if isinstance(outputs, Mapping) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def decoder_cache(layers: Iterable[Sequence[Tensor]]) -> EncoderDecoderCache:
    """An encoder-decoder's cache: the decoder's own keys and values by layer, no cross-attention ones."""
    return EncoderDecoderCache(cache_of(layers), DynamicCache())


def pairs_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a decoder's own positions, by layer."""
    self_attention = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return [(layer.keys, layer.values) for layer in self_attention.layers]


def cache_like(cache: Cache, layers: Iterable[Sequence[Tensor]]) -> Cache:
    """A cache of the same layout with other keys and values of the decoder's own positions, by layer."""
    return (decoder_cache if isinstance(cache, EncoderDecoderCache) else cache_of)(layers)


def own_cache(cache: Cache) -> Cache:
    """A new cache with the part that a trace takes: keys and values of the decoder's own positions."""
    return cache_like(cache, pairs_of(cache))


def empty_cache(like: Cache, batch: int) -> Cache:
    """An empty cache for a number of rows."""
    layers = [[t.new_empty(batch, t.shape[1], 0, t.shape[3]) for t in pair] for pair in pairs_of(like)]
    return cache_like(like, layers)


def cached_tensors(inputs: Mapping[str, Any]) -> int:
    """How many tensors the cache among some inputs holds; 0 where there is none."""
    return 2 * len(inputs[PAST].layers) if cache_layout(inputs) is CacheLayout.DECODER else 0


def batch_of(values: Iterable[Any]) -> int:
    """The number of rows of the first tensor."""
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim > 0), 1)


def positions(mask: Tensor, length: int | None = None) -> Tensor:
    """Position of each of the last `length` positions in its row, padding not counted.

    Args:
        mask: `[batch, total]`, 0 where a position is padding.
        length: How many; None for all.
    """
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted if length is None else counted[:, counted.shape[1] - length :]


def own_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the inputs, for a run that may modify them: a model appends to the cache it gets.

    Args:
        inputs: Inputs by name.
    """
    own = {
        name: value if isinstance(value, Cache) else tree_map_only(Tensor, torch.clone, value)
        for name, value in inputs.items()
    }
    if isinstance(cache := own.get(PAST), Cache):
        own[PAST] = own_cache(cache)
    return own


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
    cache, layers = _computed_cache(model, {**source, "decoder_input_ids": ids[:, :cached]})
    if not isinstance(cache, EncoderDecoderCache):
        raise TraceError(f"{type(model).__name__} keeps a {type(cache).__name__}; an EncoderDecoderCache is needed")
    cut = [[tensor[:, :, :past].contiguous() for tensor in pair] for pair in layers]
    return {**source, "decoder_input_ids": ids[:, cached:], PAST: decoder_cache(cut)}
