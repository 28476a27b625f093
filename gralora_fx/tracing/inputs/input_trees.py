"""Inputs that are tensors, or lists, tuples, dicts and dataclasses of them to any depth: their names and their form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from transformers import Cache

from gralora_fx.compat.pytree import (
    GetAttrKey,
    KeyPath,
    MappingKey,
    SequenceKey,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
)
from gralora_fx.errors import TraceError
from gralora_fx.tracing.inputs.decoder_cache import copied

FixedAxes = Mapping[str, tuple[int | None, ...]]


def leaf_paths(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every leaf of some inputs with its path, such as `images.0` or `options.scales.left`; a cache is one leaf.

    Args:
        inputs: Inputs by name.
    """
    for name, value in inputs.items():
        leaves, _ = tree_flatten_with_path(value, is_leaf=lambda found: isinstance(found, Cache))
        for keys, leaf in leaves:
            yield path_of(name, keys), leaf


def path_of(name: str, keys: KeyPath) -> str:
    """The path of a leaf of an input, such as `images.0`.

    Args:
        name: The input's name.
        keys: Where the leaf is in it.
    """
    return ".".join((name, *map(_text, keys)))


def tensor_paths(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of some inputs by its path; caches are left out.

    Args:
        inputs: Inputs by name.
    """
    return {path: leaf for path, leaf in leaf_paths(inputs) if isinstance(leaf, Tensor)}


def has_tensor(value: Any) -> bool:
    """Whether a value is a tensor, a cache, or holds either."""
    leaves = tree_leaves(value, is_leaf=lambda found: isinstance(found, Cache))
    return any(isinstance(leaf, (Tensor, Cache)) for leaf in leaves)


def distinct(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, no tensor twice: `torch.export` takes one that is given for two arguments as one input.

    Args:
        inputs: Inputs by name.
    """
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        is_first = id(tensor) not in seen
        seen.add(id(tensor))
        return tensor if is_first else tensor.detach().clone().requires_grad_(tensor.requires_grad)

    result: dict[str, Any] = tree_map_only(Tensor, own, dict(inputs), is_leaf=lambda part: isinstance(part, Cache))
    return result


def own_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of some inputs, for a run that may write into them: a model adds to the cache that it is given.

    Args:
        inputs: Inputs by name.
    """
    return {
        name: value if isinstance(value, Cache) else tree_map_only(Tensor, torch.clone, value)
        for name, value in copied(inputs).items()
    }


def same_value(one: Any, other: Any) -> bool:
    """Whether two arguments that are not tensors are the same for a model: equal, and of types that are."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or isinstance(one, bool) is not isinstance(other, bool):
        return False
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  # arrays and a user's own types compare as they like
        return False


def fixed_axes(graph: fx.Graph, inputs: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """The sizes of each input tensor that a trace holds for, by the tensor's path; None for an axis that may vary.

    Args:
        graph: A traced graph, its inputs flattened.
        inputs: What it was traced with, in the graph's order.
    """
    leaves = list(leaf_paths(inputs))
    placeholders = graph.find_nodes(op="placeholder")
    if len(leaves) != len(placeholders):  # a cache among them, whose own checks say more
        leaves = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor) and path in inputs]
        by_name = {str(node.target): node for node in placeholders}
        placeholders = [by_name.get(path) for path, _ in leaves]
    found: dict[str, tuple[int | None, ...]] = {}
    for (path, leaf), node in zip(leaves, placeholders, strict=True):
        value = None if node is None else node.meta.get("val")
        if isinstance(leaf, Tensor) and isinstance(value, Tensor):
            found[path] = tuple(int(size) if is_concrete_int(size) else None for size in value.shape)
    return found


def check_form(name: str, example: Any, value: Any, fixed: FixedAxes) -> None:
    """Check that an input of a call has the form of the example: containers, kinds of leaves, axes and constants.

    Args:
        name: The input's path.
        example: What the model was traced with.
        value: What the call gives.
        fixed: Sizes that the trace holds for.

    Raises:
        TraceError: It has another; the graph would pass over what it does not know.
    """
    if isinstance(example, Cache):
        if not isinstance(value, Cache):
            raise TraceError(f"input {name!r} is {_kind(value)}, but the trace takes a {type(example).__name__}")
    elif isinstance(example, Tensor):
        _check_tensor(name, value, fixed.get(name))
    elif isinstance(example, (list, tuple, dict)) or _is_container(example):
        _check_container(name, example, value, fixed)
    elif not same_value(example, value):
        raise TraceError(
            f"input {name!r} was {example!r} when the model was traced and is part of the graph, so it cannot be "
            f"{shown(value)}; trace again with that value"
        )


def shown(value: Any) -> str:
    """A value in a message: itself where it is short, its kind where it is not."""
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return text if text and len(text) <= 60 else _kind(value)


def _check_tensor(name: str, value: Any, sizes: tuple[int | None, ...] | None) -> None:
    if not isinstance(value, Tensor):
        how = "torch.from_numpy makes one" if type(value).__module__ == "numpy" else "torch.tensor makes one"
        raise TraceError(f"input {name!r} is {_kind(value)}, but the trace takes a tensor; {how}")
    if sizes is None:
        return
    shape = tuple(value.shape)
    if len(shape) != len(sizes) or any(size not in (None, own) for size, own in zip(sizes, shape, strict=True)):
        taken = ", ".join("any" if size is None else str(size) for size in sizes)
        raise TraceError(
            f"input {name!r} has shape {list(shape)}, but the trace takes [{taken}]; give that, or trace again with an "
            "example of the other shape"
        )


def _check_container(name: str, example: Any, value: Any, fixed: FixedAxes) -> None:
    own, given = _children(example), _children(value)
    if given is None or own is None or isinstance(own, list) is not isinstance(given, list):
        raise TraceError(f"input {name!r} is {_kind(value)}, but the trace takes a {type(example).__name__}")
    if isinstance(own, list) and isinstance(given, list):
        if len(own) != len(given):
            raise TraceError(
                f"input {name!r} has {len(given)} items, but the trace takes {len(own)}; trace again with an example "
                "of that length"
            )
        own, given = dict(enumerate(own)), dict(enumerate(given))
    assert isinstance(own, dict)
    assert isinstance(given, dict)
    other = [key for key in (*own, *given) if (key in own) is not (key in given)]
    if other:
        what = "lacks" if other[0] in own else "has"
        raise TraceError(
            f"input {name!r} {what} {', '.join(map(repr, other))}, but the trace takes {', '.join(map(repr, own))}; "
            "give these, or trace again with an example of that form"
        )
    for key, item in own.items():
        check_form(f"{name}.{key}", item, given[key], fixed)


def _children(value: Any) -> list[Any] | dict[Any, Any] | None:
    """What a container holds, in order or by name; None for what is not one."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    if not _is_container(value):
        return None
    return {_text(keys[0]): item for keys, item in _one_level(value)}


def _is_container(value: Any) -> bool:
    """Whether a value has parts that PyTorch knows of, as a registered dataclass does."""
    return any(keys for keys, _ in _one_level(value))


def _one_level(value: Any) -> list[tuple[KeyPath, Any]]:
    found, _ = tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    return found


def _text(key: Any) -> str:
    """The part of a path that an entry of it stands for."""
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
