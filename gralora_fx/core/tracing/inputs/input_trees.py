"""A call's inputs as trees of lists, tuples, dicts and dataclasses: tensors by path, and the cache among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from torch import Tensor, fx
from transformers import Cache, DynamicCache, EncoderDecoderCache

from gralora_fx.base.compat.torch_graphs import (
    GetAttrKey,
    KeyPath,
    MappingKey,
    SequenceKey,
    tree_flatten_with_path,
    tree_leaves,
)
from gralora_fx.format.input_names import PAST

FixedAxes = Mapping[str, tuple[int | None, ...]]


def leaf_paths(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every leaf of the inputs with its path, such as `pairs.0` or `options.scales.left`; a cache is one leaf."""
    for name, value in inputs.items():
        leaves, _ = tree_flatten_with_path(value, is_leaf=lambda part: isinstance(part, Cache))
        for keys, leaf in leaves:
            yield path_of(name, keys), leaf


def path_of(name: str, keys: KeyPath) -> str:
    """Return the path of a leaf of an input, such as `pairs.0`."""
    return ".".join((name, *map(key_text, keys)))


def tensor_paths(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return every tensor of the inputs by its path, without those of caches."""
    return {path: leaf for path, leaf in leaf_paths(inputs) if isinstance(leaf, Tensor)}


def placeholder_values(graph: fx.Graph, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the traced value of each input tensor, by its path in the example inputs."""
    leaves = list(leaf_paths(inputs))
    placeholders: list[fx.Node | None] = [*graph.find_nodes(op="placeholder")]
    if len(leaves) != len(placeholders):  # there is a cache, which has checks of its own
        leaves = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor) and path in inputs]
        by_name = {str(node.target): node for node in placeholders if node is not None}
        placeholders = [by_name.get(path) for path, _ in leaves]
    for (path, leaf), node in zip(leaves, placeholders, strict=True):
        value = None if node is None else node.meta.get("val")
        if isinstance(leaf, Tensor) and isinstance(value, Tensor):
            yield path, value


def has_tensor(value: Any) -> bool:
    """Return whether a value is or contains a tensor or a cache."""
    leaves = tree_leaves(value, is_leaf=lambda part: isinstance(part, Cache))
    return any(isinstance(leaf, (Tensor, Cache)) for leaf in leaves)


def same_value(one: Any, other: Any) -> bool:
    """Return whether two non-tensor arguments are the same to a model; a bool differs from a number."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or isinstance(one, bool) is not isinstance(other, bool):
        return False
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  # arrays and a user's own types may raise
        return False


def shown(value: Any) -> str:
    """Return a value for a message: its `repr` if short, else its type."""
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return text if text and len(text) <= 60 else kind_of(value)


def key_text(key: Any) -> str:
    """Return the text of one entry of a key path."""
    if isinstance(key, SequenceKey):
        return str(key.idx)
    if isinstance(key, MappingKey):
        return str(key.key)
    return key.name if isinstance(key, GetAttrKey) else str(key).strip("[].'\"")


def kind_of(value: Any) -> str:
    """Return a value's type for a message, such as `a list`."""
    if type(value).__module__ == "numpy":
        return f"a numpy {type(value).__name__}"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


class CacheLayout(Enum):
    """The layout of a model's cache between steps."""

    NONE = "none"  # no cache
    DECODER = "decoder"  # a decoder's tensors for its own positions, by layer: keys and values, or states
    ENCODER_DECODER = "encoder-decoder"  # those of the decoder's positions, and those of the encoder's output


def cache_layout(inputs: Mapping[str, Any]) -> CacheLayout:
    """Return the layout of the cache in the inputs."""
    cache = inputs.get(PAST)
    if isinstance(cache, EncoderDecoderCache):
        return CacheLayout.ENCODER_DECODER
    return CacheLayout.DECODER if isinstance(cache, DynamicCache) else CacheLayout.NONE


def batch_of(values: Iterable[Any]) -> int:
    """Return the batch size of the first tensor."""
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim > 0), 1)


def by_own_names(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a step's inputs by a forward's own names: some models take transformers' newer `cache` alone."""
    taken = inspect.signature(forward).parameters
    if PAST not in inputs or PAST in taken or "cache" not in taken:
        return inputs
    return {"cache" if name == PAST else name: value for name, value in inputs.items()}
