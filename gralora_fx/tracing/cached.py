"""Example inputs of a decoder with a cache: ids, mask, positions and past keys and values, of several sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gralora_fx.errors import TraceError, first_line

PAST = "past_key_values"
_BATCH, _PAST, _LENGTH = 2, 6, 3


def cached_inputs(
    model: PreTrainedModel, *, batch: int = _BATCH, past: int = _PAST, length: int = _LENGTH
) -> dict[str, Any]:
    """Inputs of one step: `length` new positions after `past` cached ones, a row of which begins with padding.

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
    try:
        with torch.no_grad():
            result = model(**first, past_key_values=DynamicCache(), use_cache=True)
        cache = result.past_key_values
        layers = [(layer.keys, layer.values) for layer in cache.layers]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TraceError(f"{type(model).__name__} keeps no cache of keys and values ({first_line(error)})") from error
    skip = cached - past  # a cache of no positions is one of one position, cut
    step = {name: value[:, cached:] for name, value in inputs.items()}
    step["attention_mask"] = mask[:, skip:]
    return {**step, PAST: cache_of([(key[:, :, : past or 0], value[:, :, : past or 0]) for key, value in layers])}


def cache_of(layers: Iterable[Sequence[Tensor]]) -> DynamicCache:
    """A cache of keys and values, by layer."""
    cache = DynamicCache()
    for index, (key, value) in enumerate(layers):
        cache.update(key, value, index)
    return cache


def empty_cache(like: DynamicCache, batch: int) -> DynamicCache:
    """A cache of no positions, for a number of rows."""
    pairs = [(layer.keys, layer.values) for layer in like.layers]
    return cache_of([[t.new_empty(batch, t.shape[1], 0, t.shape[3]) for t in pair] for pair in pairs])


def cached_tensors(inputs: Mapping[str, Any]) -> int:
    """How many tensors the cache among some inputs holds; 0 where there is none."""
    cache = inputs.get(PAST)
    return 2 * len(cache.layers) if isinstance(cache, DynamicCache) else 0


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


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with a cache of their own, since a model adds to the one it is given."""
    given = dict(inputs)
    if isinstance(cache := given.get(PAST), DynamicCache):
        given[PAST] = cache_of([(layer.keys, layer.values) for layer in cache.layers])
    return given


def other_cached_sizes(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Steps of other sizes: one row and one position after a long past, and a prompt after an empty one."""
    yield "one row and one position", cached_inputs(model, batch=1, past=9, length=1)
    yield "an empty cache", cached_inputs(model, batch=3, past=0, length=5)
