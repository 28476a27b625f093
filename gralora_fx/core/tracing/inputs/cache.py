"""A model's cache: its tensors by slot, copies, empty caches, and the form that a trace takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from gralora_fx.base.compat.transformers_models import DummyLayer, DynamicIndexedLayer, DynamicLayer
from gralora_fx.base.features import parts
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout, batch_of, cache_layout
from gralora_fx.errors import TraceError
from gralora_fx.format.cache_slots import KINDS, CacheSlot, keeps_state, kinds_shown
from gralora_fx.format.input_names import PAST


def returned_cache(outputs: Any) -> Cache | None:
    """Return the cache in a model's outputs, whose name differs between versions of transformers; None without one."""
    values = outputs.values() if isinstance(outputs, Mapping) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def tensors_of(cache: Cache) -> dict[CacheSlot, Tensor]:
    """Return a cache's tensors for the decoder's own positions, by slot, in the order of the graph's inputs."""
    own, part = (cache.self_attention_cache, "decoder") if isinstance(cache, EncoderDecoderCache) else (cache, "")
    kinds = kinds_shown(attributes_of(cache)).values()
    tensors: dict[CacheSlot, Tensor] = {}
    for index, layer in enumerate(own.layers):
        for kind in kinds:
            held = getattr(layer, kind.attribute, None)
            numbered = held.items() if isinstance(held, dict) else [(0, held)]
            tensors |= {CacheSlot(index, kind, n, part): t for n, t in numbered if isinstance(t, Tensor)}
    for kind in (kind for kind in kinds if kind.beside):
        beside = enumerate(getattr(cache, kind.beside, ()))
        tensors |= {CacheSlot(index, kind): t for index, t in beside if isinstance(t, Tensor)}
    return tensors


def attributes_of(cache: Cache) -> set[str]:
    """Return the attribute names of a cache and its layers, by which features recognise their caches."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return {name for part in (own, *own.layers) for name in vars(part)}


def with_tensors(like: Cache, tensors: Mapping[CacheSlot, Tensor]) -> Cache:
    """Return a cache of the same layout with clones of other tensors."""
    source = like.self_attention_cache if isinstance(like, EncoderDecoderCache) else like
    states = next(iter(parts("cache layers", attributes_of(source))), None)
    cache = DynamicCache() if states is None else states.empty(source)
    by_layer: dict[int, dict[CacheSlot, Tensor]] = {}
    for slot, tensor in tensors.items():
        by_layer.setdefault(slot.layer, {})[slot] = tensor
    for index in range(len(source)):
        own = by_layer.get(index, {})
        fresh = fresh_layer(source, index)
        cache.layers.append(fresh)
        pair = [tensor for slot, tensor in own.items() if slot.kind.attribute in ("keys", "values")]
        if pair:
            fresh.update(*pair)
        for slot, tensor in own.items():
            if slot.kind is KINDS["indexer"]:
                fresh.update_indexer(tensor)
                fresh.indexer_dtype = None  # so that a run in another precision has the same form
            elif slot.kind.grows is None:
                assert states is not None
                states.keep(cache, slot, tensor.clone())
    return EncoderDecoderCache(cache, DynamicCache()) if isinstance(like, EncoderDecoderCache) else cache


def fresh_layer(cache: Cache, index: int) -> Any:
    """Return an empty layer that keeps every position, with the kinds of state of a cache's layer."""
    for states in parts("cache layers", attributes_of(cache)):
        if (layer := states.fresh(cache, index)) is not None:
            return layer
    kind = type(cache.layers[index])
    return kind() if issubclass(kind, (DummyLayer, DynamicIndexedLayer)) else DynamicLayer()


def keeps_more(cache: Cache) -> bool:
    """Return whether layers of a cache keep more than keys and values."""
    is_indexed = any(isinstance(layer, DynamicIndexedLayer) for layer in cache.layers)
    return is_indexed or bool(parts("cache layers", attributes_of(cache)))


def own_cache(cache: Cache) -> Cache:
    """Return a new cache with the tensors that a trace takes, those of the decoder's own positions."""
    return with_tensors(cache, tensors_of(cache))


def empty_cache(like: Cache, batch: int) -> Cache:
    """Return an empty cache for a number of rows: no positions, and zero states."""
    return with_tensors(
        like, {slot: t.new_zeros(slot.kind.shape(t.shape, batch, 0)) for slot, t in tensors_of(like).items()}
    )


def fitted_cache(cache: Cache, example: Cache, batch: int) -> Cache:
    """Return a cache, empty or returned by the model, in the form that a trace with states takes.

    A window of inputs that is one longer than the trace's loses its oldest, which is never read again.
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
        if tensor is not None and slot.kind.is_window and tensor.shape[-1] == like.shape[-1] + 1:
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
    """Return the number of positions in a cache; None if it has only states, which do not show it."""
    tensors = tensors_of(cache)
    lengths = (t.shape[slot.kind.grows] for slot, t in tensors.items() if slot.kind.grows is not None)
    return next(lengths, None) if tensors else 0


def cached_slots(inputs: Mapping[str, Any]) -> list[CacheSlot]:
    """Return the slots of the decoder's cache in the inputs, in the order of the graph's inputs; empty without one."""
    return list(tensors_of(inputs[PAST])) if cache_layout(inputs) is CacheLayout.DECODER else []


def positions(mask: Tensor, length: int | None = None) -> Tensor:
    """Return position ids of the last `length` columns (None for all) of a mask `[batch, total]`, without padding."""
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted if length is None else counted[:, counted.shape[1] - length :]


def default_of_step(name: str, ids: Tensor, inputs: Mapping[str, Any], *, counts_padding: bool) -> Tensor | None:
    """Return the default mask or positions of a decoder's step for `ids [batch, length]`; None for another input."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = ids.new_ones(ids.shape[0], (cached_length(inputs[PAST]) or 0) + ids.shape[1])
    counted = positions(torch.ones_like(mask) if counts_padding else mask, ids.shape[1])
    return {"attention_mask": mask, "position_ids": counted}.get(name)


def check_step_shapes(inputs: Mapping[str, Any]) -> None:
    """Check that a step's mask `[batch, past + length]` and cache fit its tokens; the graph's own error is obscure."""
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
    if past is None:  # states alone do not show how many positions they cover
        past = max(mask.shape[-1] - length, 0)
    if tuple(mask.shape) != (batch, past + length):
        raise TraceError(
            f"attention_mask has shape {list(mask.shape)}, but {past} cached and {length} new positions of {batch} "
            f"rows need {[batch, past + length]}; give a mask over all of them"
        )
