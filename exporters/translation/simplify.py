"""Removal of nodes that ONNX does not need: casts without effect, copies, shapes computed at run time."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import base_name, is_mutable
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.operators.layers import DropPath, Reshape
from gralora_fx.errors import ExportError
from gralora_fx.exporters.rules.onnx_pipeline import FUNCTIONAL, SIMPLIFIED, UNSHARED_WRITES
from gralora_fx.exporters.translation.matching import (
    END,
    MUL,
    aten,
    concat_operands,
    expression,
    is_call,
    limits,
    number,
    same_size,
    shape,
)

_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
_COPIES = {aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.detach_.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_SHAPES = {*_VIEWS, aten.reshape.default, aten.flatten.using_ints}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default}


@contract(needs={FUNCTIONAL}, leaves={SIMPLIFIED})
def simplify(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Remove nodes that compute nothing: casts to the same dtype, copies, dropout, multiplications by 1, empty pieces.

    Other casts get the form that has a translation, splits become slices, and a squeeze names its axes. A shape of
    sizes known at trace time, 0 for an unchanged size and at most one -1, becomes a constant.
    """
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CASTS:
            _plain_cast(node)
        elif (source := _unchanged(node)) is not None:
            _drop(node, source)
        elif node.target is aten.squeeze.default:
            _named_axes(node)
        elif node.target in _SHAPES and any(expression(size) == 0 for size in shape(node)):
            _empty(node)
        elif node.target in _SHAPES:
            _constant_shape(node)
        elif node.target in _SPLITS:
            _slices(node)
        elif node.target is aten.narrow.default and isinstance(start := node.args[2], int) and start < 0:
            node.target, length = aten.slice.Tensor, node.args[3]  # ONNX counts from the end too, but not past it
            node.args = (*node.args[:3], END if start + length == 0 else start + length)
        elif (pieces := concat_operands(node)) is not None:
            _drop_empty(node, pieces)
    graph.eliminate_dead_code()
    return PassResult(before - len(graph.nodes))


def _unchanged(node: fx.Node) -> Any:
    """Return the input that a node returns unchanged; None if it computes something."""
    drop_path = DropPath.of(node)
    if drop_path is not None:
        return None if drop_path.train else drop_path.x
    source = node.args[0] if node.args else None
    if is_call(node, aten.slice.Tensor):
        before, after = shape(source), shape(node)
        given: list[Any] = [*node.args[2:]]
        start, stop, step = given + [0, END, 1][len(given) :]
        is_open = (start == 0 or not isinstance(start, int)) and (stop == END or not isinstance(stop, int))
        is_whole = step == 1 and (is_open or all(isinstance(size, int) for size in before))
        whole = is_whole and all(same_size(a, b) for a, b in zip(before, after, strict=True))
    elif is_call(node, *MUL):
        whole = number(node.args[1]) == 1.0 and _alike(node, source)
    elif is_call(node, aten.squeeze.dim):  # of an axis that is larger, which ONNX does not allow
        whole, axis = _alike(node, source), number(node.args[1])
        if whole and axis is not None and not isinstance(expression(shape(source)[int(axis)]), int):
            from gralora_fx.core.tracing.failures import call_named

            raise ExportError(
                f"{call_named(node)} removes an axis at size 1 and keeps it at others, which no ONNX graph does: "
                "select from the axis (x[:, 0]), or reshape"
            )
    else:
        whole = node.target in _COPIES or (is_call(node, aten.dropout.default) and not node.args[2])
    return source if whole else None


def _alike(node: fx.Node, other: Any) -> bool:
    if not isinstance(other, fx.Node) or not isinstance(value := other.meta.get("val"), Tensor):
        return False
    return bool(value.dtype == node.meta["val"].dtype) and len(value.shape) == len(node.meta["val"].shape)


def _drop(node: fx.Node, source: Any) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _plain_cast(node: fx.Node) -> None:
    """Rewrite a conversion to the form that ONNX has, or drop it if it changes nothing."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        _drop(node, source)
        return
    node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}


def _named_axes(node: fx.Node) -> None:
    """Name the squeezed axes; without names, a batch of one row would be squeezed too.

    Before: `squeeze(x)` of `[batch, 1]`
    After:  `squeeze(x, 1)`
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axes = [axis for axis, size in enumerate(shape(source)) if expression(size) == 1]
    for axis in reversed(axes):
        with node.graph.inserting_before(node):
            dropped = node.graph.call_function(aten.squeeze.dim, (source, axis))
        dropped.meta = {**node.meta, "val": source.meta["val"].squeeze(axis)}
        source = dropped
    _drop(node, source)


def _empty(node: fx.Node) -> None:
    """Create an empty tensor instead of reshaping to it: in an ONNX shape, 0 means an unchanged size."""
    node.args, node.kwargs = (node.args[1], 0), {"dtype": node.meta["val"].dtype}
    node.target = aten.full.default


def _constant_shape(node: fx.Node) -> None:
    """Make a new shape constant if at most one of its sizes has to be inferred."""
    before, after = shape(node.args[0]), shape(node)
    sizes: list[int] = []
    for axis, size in enumerate(after):
        known = expression(size)
        if isinstance(known, int):
            sizes.append(known)
        elif axis < len(before) and expression(before[axis]) == known:
            sizes.append(0)
        else:
            sizes.append(-1)
    if node.target in _VIEWS:
        node.target = aten.reshape.default  # of a tensor whose copy may be gone, so it is not a view
    if sizes.count(-1) > 1 or not after or any(known == 0 and axis >= len(before) for axis, known in enumerate(sizes)):
        return
    if any(expression(size) == 0 for size in after):  # 0 has another meaning in a constant shape
        return
    source = node.args[0]
    assert isinstance(source, fx.Node)
    Reshape(source, sizes).write(node)


def _slices(node: fx.Node) -> None:
    """Replace a split by slices, if the sizes of its pieces are known at trace time."""
    source = node.args[0]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if not isinstance(dim, int) or any(not is_call(user, operator.getitem) for user in node.users):
        return
    dim %= len(shape(source))
    sizes = [expression(piece.shape[dim]) for piece in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        start = sum(sizes[:index])
        user.target, user.args = aten.slice.Tensor, (source, dim, start, start + sizes[index])


def _drop_empty(node: fx.Node, pieces: list[Any]) -> None:
    nonempty = [piece for piece in pieces if not shape(piece) or expression(shape(piece)[-1]) != 0]
    if len(nonempty) == 1 and len(pieces) > 1:
        _drop(node, nonempty[0])
    elif nonempty and len(nonempty) < len(pieces):
        node.args = (nonempty, *node.args[1:])


def constant_slices(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace slices with known limits by slices with constant limits."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        slice_args = limits(node)
        if slice_args is not None:
            slice_args.write(node)
            count += 1
    return PassResult(count)


@contract(needs={SIMPLIFIED})
def addmm_to_matmul(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace `addmm` on flattened rows by a batched matmul and an addition.

    Before: `y = reshape(addmm(bias, reshape(x, [-1, n]), weight), [b, s, m])`
    After:  `y = matmul(x, weight) + bias`
    """
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, aten.addmm.default) or node.kwargs or len(node.args) != 3 or len(node.users) != 1:
            continue
        bias, rows, weight = node.args
        (user,) = node.users
        flat = Reshape.of(rows)
        if flat is None or not is_call(user, Reshape.target, *_SHAPES):
            continue
        before, after = shape(flat.x), shape(user)
        if len(before) != len(after) or not all(map(same_size, before[:-1], after[:-1])):
            continue
        with graph.inserting_before(user):
            product = graph.call_function(aten.matmul.default, (flat.x, weight))
            result = graph.call_function(aten.add.Tensor, (product, bias))
        product.meta, result.meta = dict(user.meta), dict(user.meta)
        user.replace_all_uses_with(result)
        count += 1
    graph.eliminate_dead_code()
    return PassResult(count)


@contract(needs={UNSHARED_WRITES}, leaves={FUNCTIONAL})
def out_of_place(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace in-place operators by out-of-place ones, in place in the graph; later readers read the result.

    Before: `x.add_(y); z = f(x)`
    After:  `x2 = x.add(y); z = f(x2)`
    """
    return PassResult(sum(_out_of_place(node) for node in list(graph.nodes) if node.op == "call_function"))


def _out_of_place(node: fx.Node) -> bool:
    functional = _functional(node.target)
    if functional is None:
        return False
    written = node.args[0]
    assert isinstance(written, fx.Node)
    node.target = functional
    later = set()
    follower = node.next
    while follower.op != "root":
        later.add(follower)
        follower = follower.next
    written.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)
    return True


def _functional(target: Any) -> Any:
    """Return the out-of-place variant of an operator that writes into its first argument; None for others."""
    if not is_mutable(target):
        return None
    name = base_name(target)
    if not name.endswith("_"):
        return None
    if target is aten.pow_.Scalar:
        return aten.pow.Tensor_Scalar  # `pow.Scalar` is a power of a number
    return getattr(getattr(aten, name.removesuffix("_"), None), target._overloadname, None)
