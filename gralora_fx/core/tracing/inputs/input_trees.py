"""Inputs of a call: nested lists, tuples, dicts and dataclasses of tensors, by path; and the cache among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from torch import Tensor
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
    """Every leaf of the inputs with its path, such as `pairs.0` or `options.scales.left`; a cache is one leaf."""
    for name, value in inputs.items():
        leaves, _ = tree_flatten_with_path(value, is_leaf=lambda part: isinstance(part, Cache))
        for keys, leaf in leaves:
            yield path_of(name, keys), leaf


def path_of(name: str, keys: KeyPath) -> str:
    """The path of a leaf of an input, such as `pairs.0`."""
    return ".".join((name, *map(key_text, keys)))


def tensor_paths(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the inputs by its path; caches are left out."""
    return {path: leaf for path, leaf in leaf_paths(inputs) if isinstance(leaf, Tensor)}


def has_tensor(value: Any) -> bool:
    """Whether a value is a tensor, a cache, or holds either."""
    leaves = tree_leaves(value, is_leaf=lambda part: isinstance(part, Cache))
    return any(isinstance(leaf, (Tensor, Cache)) for leaf in leaves)


def same_value(one: Any, other: Any) -> bool:
    """Whether two arguments other than tensors are equal for a model, a bool differing from a number."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or isinstance(one, bool) is not isinstance(other, bool):
        return False
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  # arrays and a user's own types may raise
        return False


def shown(value: Any) -> str:
    """A value for a message: its `repr` if it is short, else its type."""
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return text if text and len(text) <= 60 else kind_of(value)


def key_text(key: Any) -> str:
    """The text of one entry of a key path."""
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
