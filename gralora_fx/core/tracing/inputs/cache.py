"""The cache of a model: what it holds by slot, copies of it, empty ones, and those that a trace takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from gralora_fx.base.compat.transformers_models import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from gralora_fx.core.tracing.inputs.layouts import CacheLayout, batch_of, cache_layout
from gralora_fx.errors import TraceError
from gralora_fx.format.cache_slots import KINDS, CacheSlot, keeps_state
from gralora_fx.format.input_names import PAST

_BESIDE = "linear_cache"  # where MiniMax's cache keeps the states of lightning attention, beside its layers
OF_MORE_THAN_KEYS = (LinearAttentionLayer, DynamicIndexedLayer)  # layers with tensors beside keys and values


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


def tensors_of(cache: Cache) -> dict[CacheSlot, Tensor]:
    """What a cache holds of a decoder's own positions, by slot, in the order in which a graph takes the tensors."""
    is_pair = isinstance(cache, EncoderDecoderCache)
    layers = cache.self_attention_cache.layers if is_pair else cache.layers
    tensors: dict[CacheSlot, Tensor] = {}
    for index, layer in enumerate(layers):
        for kind in KINDS.values():
            held = getattr(layer, kind.attribute, None)
            numbered = held.items() if isinstance(held, dict) else [(0, held)]
            part = "decoder" if is_pair else ""
            tensors |= {CacheSlot(index, kind, n, part): t for n, t in numbered if isinstance(t, Tensor)}
    beside = enumerate(getattr(cache, _BESIDE, ()))
    return tensors | {CacheSlot(index, KINDS["recurrent"]): t for index, t in beside if isinstance(t, Tensor)}


def with_tensors(like: Cache, tensors: Mapping[CacheSlot, Tensor]) -> Cache:
    """A cache of the same layout with other tensors, in memory of their own."""
    source = like.self_attention_cache if isinstance(like, EncoderDecoderCache) else like
    cache = type(source)() if (keeps_beside := hasattr(source, _BESIDE)) else DynamicCache()
    by_layer: dict[int, dict[CacheSlot, Tensor]] = {}
    for slot, tensor in tensors.items():
        by_layer.setdefault(slot.layer, {})[slot] = tensor
    for index in range(len(source)):
        own = by_layer.get(index, {})
        has_own_layer = not keeps_beside or any(slot.kind.grows is not None for slot in own)
        fresh = fresh_layer(source.layers[index]) if has_own_layer else LinearAttentionLayer()
        pair = [tensor for slot, tensor in own.items() if slot.kind.attribute in ("keys", "values")]
        if pair:
            fresh.update(*pair)
        for slot, tensor in own.items():
            if slot.kind is KINDS["indexer"]:
                fresh.update_indexer(tensor)
                fresh.indexer_dtype = None  # so that a run in another precision has the same form
            elif keeps_beside and slot.kind.grows is None:
                cache.set_linear_cache(index, tensor.clone())
            elif slot.kind.grows is None:
                _set_state(fresh, slot, tensor.clone())
        cache.layers.append(fresh)
    return EncoderDecoderCache(cache, DynamicCache()) if isinstance(like, EncoderDecoderCache) else cache


def fresh_layer(layer: Any) -> Any:
    """An empty layer of the same kinds of state, which keeps every position."""
    if isinstance(layer, (DummyLayer, DynamicIndexedLayer)):
        return type(layer)()
    if not isinstance(layer, LinearAttentionLayer):
        return DynamicLayer()
    kind = LinearAttentionAndFullAttentionLayer if isinstance(layer, DynamicLayer) else LinearAttentionLayer
    return kind(number_of_states=layer.number_of_states)


def _set_state(layer: Any, slot: CacheSlot, state: Tensor) -> None:
    getattr(layer, slot.kind.attribute)[slot.number] = state
    getattr(layer, f"is_{slot.kind.attribute}_initialized")[slot.number] = True
    layer.has_previous_state[slot.number] = True
    if slot.kind is KINDS["conv"]:
        layer.conv_kernel_size[slot.number] = state.shape[-1]
        layer.device = state.device  # and no dtype, so that a run in another precision has the same form


def own_cache(cache: Cache) -> Cache:
    """A new cache with the part that a trace takes: what is kept of the decoder's own positions."""
    return with_tensors(cache, tensors_of(cache))


def empty_cache(like: Cache, batch: int) -> Cache:
    """An empty cache for a number of rows: no positions, and states of zeros."""
    return with_tensors(
        like, {slot: t.new_zeros(slot.kind.shape(t.shape, batch, 0)) for slot, t in tensors_of(like).items()}
    )


def fitted_cache(cache: Cache, example: Cache, batch: int) -> Cache:
    """A cache as a trace takes it that keeps states: one that the model itself returned, or an empty one.

    A model keeps as many inputs of a convolution as its kernel is wide; the trace takes those that are read again.
    """
    are_decoders = isinstance(cache, DynamicCache) and isinstance(example, DynamicCache)
    if not are_decoders or not keeps_state(tensors_of(example)):
        return cache
    given, wanted = tensors_of(cache), tensors_of(example)
    if not given:
        return empty_cache(example, batch)
    fitted: dict[CacheSlot, Tensor] = {}
    for slot, like in wanted.items():
        tensor = given.get(slot)
        if tensor is not None and slot.kind is KINDS["conv"] and tensor.shape[-1] == like.shape[-1] + 1:
            tensor = tensor[..., 1:]
        length = 0 if slot.kind.grows is None or tensor is None else tensor.shape[slot.kind.grows]
        shape = slot.kind.shape(like.shape, batch, length)
        if tensor is None or tuple(tensor.shape) != shape:
            what = "none" if tensor is None else f"one of shape {list(tensor.shape)}"
            raise TraceError(
                f"{PAST} has {what} at {slot.place}, where a step of {batch} rows takes {list(shape)}; give a cache "
                "that this model returned, or none for an empty one"
            )
        fitted[slot] = tensor
    if extra := next((slot for slot in given if slot not in wanted), None):
        raise TraceError(f"{PAST} has a tensor at {extra.place}, which this model does not keep; give its own cache")
    return with_tensors(example, fitted)


def cached_length(cache: Cache) -> int | None:
    """How many positions a cache holds; None of one with states alone, which do not tell."""
    tensors = tensors_of(cache)
    lengths = (t.shape[slot.kind.grows] for slot, t in tensors.items() if slot.kind.grows is not None)
    return next(lengths, None) if tensors else 0


def cached_slots(inputs: Mapping[str, Any]) -> list[CacheSlot]:
    """The slots of the decoder's cache among some inputs, in the order of the graph's inputs; none without one."""
    return list(tensors_of(inputs[PAST])) if cache_layout(inputs) is CacheLayout.DECODER else []


def positions(mask: Tensor, length: int | None = None) -> Tensor:
    """Position of each of the last `length` positions in its row, padding not counted.

    Args:
        mask: `[batch, total]`, 0 where a position is padding.
        length: How many; None for all.
    """
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted if length is None else counted[:, counted.shape[1] - length :]


def default_of_step(name: str, ids: Tensor, inputs: Mapping[str, Any], *, counts_padding: bool) -> Tensor | None:
    """Return the default mask or positions of a decoder's step; None for another input.

    Args:
        name: Name of the input.
        ids: `[batch, length]`.
        inputs: The inputs given, a cache among them.
        counts_padding: Whether positions count the padding before them.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = ids.new_ones(ids.shape[0], (cached_length(inputs[PAST]) or 0) + ids.shape[1])
    counted = positions(torch.ones_like(mask) if counts_padding else mask, ids.shape[1])
    return {"attention_mask": mask, "position_ids": counted}.get(name)


def check_step_shapes(inputs: Mapping[str, Any]) -> None:
    """Check that a decoder step's mask and cache fit its tokens, since the graph's own error would be obscure.

    Raises:
        TraceError: The mask is not `[batch, past + length]`, or the cache has other rows than the tokens.
    """
    ids, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", PAST))
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and isinstance(cache, DynamicCache)):
        return
    if ids.ndim != 2:
        raise TraceError(f"input_ids has shape {list(ids.shape)}, but a step takes [batch, length]")
    tensors = tensors_of(cache)
    if not tensors:
        raise TraceError(f"{PAST} has no layers; leave it out for an empty cache, or give one that the model returned")
    past, rows, (batch, length) = cached_length(cache), batch_of(tensors.values()), ids.shape
    if rows != batch:
        raise TraceError(f"{PAST} has {rows} rows, but input_ids has shape {list(ids.shape)}; give one of it")
    if past is None:  # states alone, which do not tell how many positions they are of
        past = max(mask.shape[-1] - length, 0)
    if tuple(mask.shape) != (batch, past + length):
        raise TraceError(
            f"attention_mask has shape {list(mask.shape)}, but {past} cached and {length} new positions of {batch} "
            f"rows need {[batch, past + length]}; give a mask over all of them"
        )
