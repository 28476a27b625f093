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
from gralora_fx.errors import TraceError
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
    return ".".join((name, *map(_text, keys)))


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


def check_form(name: str, example: Any, value: Any, fixed: FixedAxes) -> None:
    """Check that an input has the structure of the example: containers, types of leaves, axes and constants."""
    if isinstance(example, Cache):
        if not isinstance(value, Cache):
            raise TraceError(f"input {name!r} is {_kind(value)}, but the trace takes a {type(example).__name__}")
    elif isinstance(example, Tensor):
        check_tensor(name, value, fixed.get(name))
    elif isinstance(example, (list, tuple, dict)) or _is_container(example):
        _check_container(name, example, value, fixed)
    elif not same_value(example, value):
        raise TraceError(
            f"input {name!r} was {example!r} when the model was traced and is part of the graph, so it cannot be "
            f"{shown(value)}; trace again with that value"
        )


def shown(value: Any) -> str:
    """A value for a message: its `repr` if it is short, else its type."""
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return text if text and len(text) <= 60 else _kind(value)


def check_tensor(name: str, value: Any, sizes: tuple[int | None, ...] | None) -> None:
    """Check that an input is a tensor, with the sizes that the trace takes."""
    if not isinstance(value, Tensor):
        hint = "torch.from_numpy makes one" if type(value).__module__ == "numpy" else "torch.tensor makes one"
        raise TraceError(f"input {name!r} is {_kind(value)}, but the trace takes a tensor; {hint}")
    if sizes is None:
        return
    shape = tuple(value.shape)
    if len(shape) != len(sizes) or any(size not in (None, actual) for size, actual in zip(sizes, shape, strict=True)):
        accepted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise TraceError(
            f"input {name!r} has shape {list(shape)}, but the trace takes [{accepted}]; give that, or trace again with "
            "an "
            "example of the other shape"
        )


def _check_container(name: str, example: Any, value: Any, fixed: FixedAxes) -> None:
    expected, actual = _children(example), _children(value)
    if actual is None or expected is None or isinstance(expected, list) is not isinstance(actual, list):
        raise TraceError(f"input {name!r} is {_kind(value)}, but the trace takes a {type(example).__name__}")
    if isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            raise TraceError(
                f"input {name!r} has {len(actual)} items, but the trace takes {len(expected)}; trace again with an "
                "example "
                "of that length"
            )
        expected, actual = dict(enumerate(expected)), dict(enumerate(actual))
    assert isinstance(expected, dict)
    assert isinstance(actual, dict)
    other = [key for key in (*expected, *actual) if (key in expected) is not (key in actual)]
    if other:
        verb = "lacks" if other[0] in expected else "has"
        raise TraceError(
            f"input {name!r} {verb} {', '.join(map(repr, other))}, but the trace takes "
            f"{', '.join(map(repr, expected))}; "
            "give these, or trace again with an example of that form"
        )
    for key, item in expected.items():
        check_form(f"{name}.{key}", item, actual[key], fixed)


def _children(value: Any) -> list[Any] | dict[Any, Any] | None:
    """The items of a container, in order or by name; None for anything else."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    if not _is_container(value):
        return None
    return {_text(keys[0]): item for keys, item in _one_level(value)}


def _is_container(value: Any) -> bool:
    """Whether a value is a container for pytree, such as a registered dataclass."""
    return any(keys for keys, _ in _one_level(value))


def _one_level(value: Any) -> list[tuple[KeyPath, Any]]:
    entries, _ = tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    return entries


def _text(key: Any) -> str:
    """The text of one entry of a key path."""
    if isinstance(key, SequenceKey):
        return str(key.idx)
    if isinstance(key, MappingKey):
        return str(key.key)
    return key.name if isinstance(key, GetAttrKey) else str(key).strip("[].'\"")


def _kind(value: Any) -> str:
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
