"""Linear calls: nodes that multiply an activation by a weight parameter, or by its transpose or some of its rows.

They are in the graph itself, or in a branch or a loop. There, the layer's weight is an operand of the node that runs
the subgraph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from gralora_fx.base.compat.torch_graphs import tree_leaves

_aten = torch.ops.aten
_TRANSPOSE = {_aten.numpy_T.default, _aten.t.default, "t"}
_SWAP_AXES = {_aten.transpose.int, torch.transpose, "transpose"}
_PERMUTE = {_aten.permute.default, torch.permute}
_SPLIT = {_aten.split_with_sizes.default, _aten.split.Tensor, _aten.split.sizes, torch.split, "split"}
_CHUNK = {_aten.chunk.default, torch.chunk, "chunk"}
_SLICE = {_aten.slice.Tensor}
_NARROW = {_aten.narrow.default, torch.narrow, "narrow"}


_UNPACKED = "gralora_unpacked"  # of a node that computes a parameter, from few bits or a file: the parameter's name


def mark_unpacked(node: fx.Node, name: str) -> None:
    """Mark a node as the computed values of a parameter, which a linear call may multiply by."""
    node.meta.setdefault("custom", {})[_UNPACKED] = name


def is_unpacked(value: object) -> bool:
    """Return whether a value is a node marked by `mark_unpacked`."""
    return isinstance(value, fx.Node) and _UNPACKED in value.meta.get("custom", {})


@dataclass(frozen=True)
class Origin:
    """A view's parameter."""

    node: fx.Node  # the `get_attr` node
    is_transposed: bool = False  # whether the view is its 2-D transpose
    rows: tuple[int, int] | None = None  # start and end of the view's rows; None for all


def origin_of(value: object) -> Origin | None:
    """Return the parameter that a value is, or is a view of (transposed or some rows); None for anything else."""
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr" or is_unpacked(value):
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
    """Yield the nodes that read a parameter, directly or through views."""
    for user in source.users:
        if is_view(user):
            yield from readers(user)
        else:
            yield user


def is_view(node: fx.Node) -> bool:
    """Return whether a node is a view of a parameter, or a split into such views."""
    return node.op != "get_attr" and (origin_of(node) is not None or _splits(node))


def tensor_at(graph_module: nn.Module, target: str) -> torch.Tensor | None:
    """Return the parameter or buffer that a `get_attr` node of this target reads; None for another attribute."""
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
    """Return a row slice's source, start and end; None if a node is not a row slice."""
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
    """Return the numbers of rows of a split's parts."""
    split_arg = node.args[1] if len(node.args) > 1 else None
    if isinstance(split_arg, (list, tuple)):
        return [int(size) for size in split_arg] if all(isinstance(size, int) for size in split_arg) else None
    height = _height(node.args[0])
    if height is None or not isinstance(split_arg, int) or split_arg < 1:
        return None
    width = -(-height // split_arg) if node.target in _CHUNK else split_arg
    return [min(width, height - start) for start in range(0, height, width)]


def _height(value: object) -> int | None:
    """Return the number of rows of a parameter or of its view; None if it is unknown or transposed."""
    origin = origin_of(value)
    if origin is None or origin.is_transposed:
        return None
    if origin.rows is not None:
        return origin.rows[1] - origin.rows[0]
    owner = origin.node.graph.owning_module
    if is_unpacked(origin.node):
        tensor = origin.node.meta.get("val")
    else:
        tensor = None if owner is None else tensor_at(owner, str(origin.node.target))
    return None if tensor is None or not tensor.ndim else tensor.shape[0]


_LINEAR = {_aten.linear.default, torch.nn.functional.linear}
_ADDMM = {_aten.addmm.default, torch.addmm}
_MATMUL = {_aten.matmul.default, _aten.mm.default, torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}

WEIGHTS = "gralora_weights"  # of the annotation that names layers by their operands
_hop = torch.ops.higher_order
# operator: positions of its subgraphs, of its operand lists, and of the list that is the same for every run
_OPERATORS: dict[Any, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    _hop.cond: ((1, 2), (3,), 3),
    _hop.while_loop: ((0, 1), (2, 3), 3),
    _hop.map_impl: ((0,), (1, 2), 2),
    _hop.scan: ((0,), (1, 2, 3), 3),
}


@dataclass(frozen=True)
class LinearCall:
    """One node that multiplies an input by a weight."""

    node: fx.Node  # the node whose value is `input @ weight` (with the bias, if the operator adds it)
    input: fx.Node  # the activation, `[..., in]`
    weight: fx.Node  # the `get_attr` node of the weight, or the node that computes it
    bias: fx.Node | None  # the `get_attr` node of the bias, or None
    stored_transposed: bool  # whether the weight is `[in, out]` rather than `[out, in]`
    # range of output features, if the call uses only a part of the weight, as `nn.MultiheadAttention` does with its
    # `in_proj_weight`; None if it uses the whole
    rows: tuple[int, int] | None = None
    # for a call inside a branch or a loop: the position of the weight among the operands of the node that runs it.
    # `input` is then that node itself, not the layer's input
    operand: tuple[int, int] | None = None
    # the node that the operator adds to the product: the bias, or a node that computes or slices it
    added: fx.Node | None = None


def match_linear_call(node: fx.Node, *, computed: bool = False) -> LinearCall | None:
    """Match `linear(x, w, b)`, `addmm(b, x, w)` and `x @ w`, where `w` is a parameter, its transpose or some rows."""
    if node.op not in ("call_function", "call_method"):
        return None
    operands: list[object] = [*node.args, *node.kwargs.values()]
    bias: object = None
    if node.target in _LINEAR and len(operands) in (2, 3):
        x, operand, bias = operands if len(operands) == 3 else (*operands, None)
        multiplies_transpose = True
    elif node.target in _ADDMM and len(operands) == 3:
        bias, x, operand = operands
        multiplies_transpose = False
    elif node.target in _MATMUL and len(operands) == 2:
        x, operand = operands
        multiplies_transpose = False
    else:
        return None
    weight = origin_of(operand)
    if weight is None and computed and multiplies_transpose and isinstance(operand, fx.Node):
        weight = Origin(operand)
    if not isinstance(x, fx.Node) or weight is None:
        return None
    stored_transposed = multiplies_transpose == weight.is_transposed
    if weight.rows is not None and stored_transposed:
        return None
    bias_origin = origin_of(bias)
    bias_node = None if bias_origin is None else bias_origin.node
    added = bias if isinstance(bias, fx.Node) else None
    return LinearCall(node, x, weight.node, bias_node, stored_transposed, weight.rows, added=added)


def calls_at(node: fx.Node, path: str) -> tuple[LinearCall, ...]:
    """Return a node's calls of the layer at a path, its own or in a subgraph that it runs."""
    positions = noted_weights(node, path)
    if positions:
        return tuple(_subgraph_call(node, (group, index)) for group, index in positions)
    call = match_linear_call(node, computed=True)
    return () if call is None else (call,)


def subgraph_calls(node: fx.Node, root: nn.Module) -> Iterator[LinearCall]:
    """Yield the layer calls in the subgraphs that a node runs, for parameters that these use only as weights."""
    if node.target not in _OPERATORS:
        return
    _, _, fixed = _OPERATORS[node.target]
    for index, operand in enumerate(_operands(node, fixed)):
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            uses = list(_uses(node, fixed, index, root))
            if uses and all(uses):
                yield _subgraph_call(node, (fixed, index))


def _subgraph_call(node: fx.Node, position: tuple[int, int]) -> LinearCall:
    group, index = position
    weight: fx.Node = _operands(node, group)[index]
    return LinearCall(node, node, weight, None, stored_transposed=False, operand=position)


def note_weight(node: fx.Node, path: str, position: tuple[int, int]) -> None:
    """Annotate a node that runs subgraphs with the operand that is a layer's weight."""
    notes = node.meta.setdefault("custom", {}).setdefault(WEIGHTS, {})
    notes[path] = [*(other for other in notes.get(path, []) if other != list(position)), list(position)]


def noted_weights(node: fx.Node, path: str) -> Sequence[Sequence[int]]:
    """Return the positions of a node's operands that are a layer's weight."""
    positions: Sequence[Sequence[int]] = node.meta.get("custom", {}).get(WEIGHTS, {}).get(path, ())
    return positions


def replace_operand(node: fx.Node, position: tuple[int, int], value: fx.Node) -> None:
    """Replace an operand of a node."""
    group, index = position
    operands = _operands(node, group)
    operands[index] = value
    node.update_arg(group, tuple(operands) if isinstance(node.args[group], tuple) else operands)


def _operands(node: fx.Node, group: int) -> list[Any]:
    """Return one list of operands of a node that runs subgraphs, by its position among the arguments."""
    return list(cast("Sequence[Any]", node.args[group]))


def _uses(node: fx.Node, group: int, index: int, root: nn.Module) -> Iterator[bool]:
    """Yield, for each reader of an operand in the subgraphs, whether it is a linear call with that weight."""
    subgraphs, groups, _ = _OPERATORS[node.target]
    slot = sum(len(_operands(node, before)) for before in groups if before < group) + index
    for position in subgraphs:
        module = root.get_submodule(str(cast("fx.Node", node.args[position]).target))
        placeholders = module.graph.find_nodes(op="placeholder") if isinstance(module, fx.GraphModule) else []
        if slot >= len(placeholders):
            yield False
            continue
        placeholder = placeholders[slot]
        for user in placeholder.users:
            if user.target in _OPERATORS:
                fixed = _OPERATORS[user.target][2]
                slots = [at for at, value in enumerate(_operands(user, fixed)) if value is placeholder]
                others = [value for at, value in enumerate(user.args) if at != fixed]
                yield len(slots) == 1 and placeholder not in tree_leaves(others)
                for at in slots:
                    yield from _uses(user, fixed, at, module)
            else:
                others = [value for at, value in enumerate(user.args) if at != 1]
                yield (
                    user.target is torch.ops.aten.linear.default
                    and user.args[1] is placeholder
                    and placeholder not in others
                )
