"""Views of a parameter in a graph: transposes and row slices, as used by linear calls."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

_aten = torch.ops.aten
_TRANSPOSE = {_aten.numpy_T.default, _aten.t.default, "t"}
_SWAP_AXES = {_aten.transpose.int, torch.transpose, "transpose"}
_PERMUTE = {_aten.permute.default, torch.permute}
_SPLIT = {_aten.split_with_sizes.default, _aten.split.Tensor, _aten.split.sizes, torch.split, "split"}
_CHUNK = {_aten.chunk.default, torch.chunk, "chunk"}
_SLICE = {_aten.slice.Tensor}
_NARROW = {_aten.narrow.default, torch.narrow, "narrow"}


@dataclass(frozen=True)
class Origin:
    """The parameter of which a value is a view.

    Attributes:
        node: The `get_attr` node.
        is_transposed: Whether the view is its 2-D transpose.
        rows: Start and end of the view's rows; None for all.
    """

    node: fx.Node
    is_transposed: bool = False
    rows: tuple[int, int] | None = None


def origin_of(value: object) -> Origin | None:
    """The parameter that a value is or views (transposed or some rows); None for anything else."""
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        return Origin(value)
    if value.op not in ("call_function", "call_method"):
        return None
    if _is_transpose(value):
        inner = origin_of(value.args[0])
        return None if inner is None else Origin(inner.node, not inner.is_transposed, inner.rows)
    row_range = _row_range(value)
    if row_range is None:
        return None
    source, start, stop = row_range
    inner = origin_of(source)
    if inner is None or inner.is_transposed:
        return None
    first = 0 if inner.rows is None else inner.rows[0]
    return Origin(inner.node, rows=(first + start, first + stop))


def readers(source: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a parameter, directly or through views."""
    for user in source.users:
        if is_view(user):
            yield from readers(user)
        else:
            yield user


def is_view(node: fx.Node) -> bool:
    """Whether a node is a view of a parameter, or a split of which views are items."""
    return node.op != "get_attr" and (origin_of(node) is not None or _splits(node))


def tensor_at(graph_module: nn.Module, target: str) -> torch.Tensor | None:
    """The parameter or buffer that a `get_attr` node of this target reads."""
    owner, _, name = target.rpartition(".")
    tensor = getattr(graph_module.get_submodule(owner), name, None)
    return tensor if isinstance(tensor, torch.Tensor) else None


def _is_transpose(node: fx.Node) -> bool:
    rest = list(node.args[1:])
    if node.target in _TRANSPOSE:
        return not rest
    if node.target in _SWAP_AXES:
        return rest in ([0, 1], [1, 0], [-1, -2], [-2, -1])
    if node.target in _PERMUTE:
        return [list(axes) if isinstance(axes, (list, tuple)) else axes for axes in rest] == [[1, 0]]
    return node.target is getattr and rest in (["T"], ["mT"])


def _splits(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in _SPLIT | _CHUNK and _axis(node, 2) == 0 and origin_of(node.args[0]) is not None


def _axis(node: fx.Node, position: int) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)


def _row_range(node: fx.Node) -> tuple[object, int, int] | None:
    """The source of a row slice, with its start and end; None if a node is not a row slice."""
    source, rest = (node.args[0], node.args[1:]) if node.args else (None, ())
    if node.target is operator.getitem and isinstance(source, fx.Node) and _splits(source):
        sizes, index = _part_sizes(source), rest[0]
        if not isinstance(index, int) or sizes is None or not -len(sizes) <= index < len(sizes):
            return None
        start = sum(sizes[: index % len(sizes)])
        return source.args[0], start, start + sizes[index]
    if node.target is operator.getitem and isinstance(rest[0], slice):
        return _sliced(source, rest[0])
    if node.target in _SLICE and _axis(node, 1) == 0:
        return _sliced(source, slice(*(*rest[1:], None, None, None)[:3]))
    if node.target in _NARROW and _axis(node, 1) == 0:
        first, length = rest[1:3]
        height = _height(source)
        if isinstance(first, int) and isinstance(length, int) and height is not None:
            first += height if first < 0 else 0
            return _sliced(source, slice(first, first + length))
    return None


def _sliced(source: object, selection: slice) -> tuple[object, int, int] | None:
    height = _height(source)
    bounds = (selection.start, selection.stop)
    if height is None or selection.step not in (None, 1) or not all(b is None or isinstance(b, int) for b in bounds):
        return None
    start, stop, _ = selection.indices(height)
    return source, start, stop


def _part_sizes(node: fx.Node) -> Sequence[int] | None:
    """Numbers of rows of a split's parts."""
    split_arg = node.args[1] if len(node.args) > 1 else None
    if isinstance(split_arg, (list, tuple)):
        return [int(size) for size in split_arg] if all(isinstance(size, int) for size in split_arg) else None
    height = _height(node.args[0])
    if height is None or not isinstance(split_arg, int) or split_arg < 1:
        return None
    width = -(-height // split_arg) if node.target in _CHUNK else split_arg
    return [min(width, height - start) for start in range(0, height, width)]


def _height(value: object) -> int | None:
    """Number of rows of a view of a parameter."""
    origin = origin_of(value)
    if origin is None or origin.is_transposed:
        return None
    if origin.rows is not None:
        return origin.rows[1] - origin.rows[0]
    owner = origin.node.graph.owning_module
    tensor = None if owner is None else tensor_at(owner, str(origin.node.target))
    return None if tensor is None or not tensor.ndim else tensor.shape[0]
