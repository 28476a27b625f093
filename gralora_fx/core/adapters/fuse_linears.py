"""Adapted and packed layers as one node each in the training graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import is_forward_mode, is_transformed
from gralora_fx.core.graph.effects import may_write, without_effect
from gralora_fx.core.graph.linear_calls import is_unpacked
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.methods.low_rank import accumulate, project, set_rows, take_rows

if TYPE_CHECKING:
    from gralora_fx.core.adapters.adapted_linear import SharedInput, Weight
    from gralora_fx.core.methods.low_rank import Rows

_LINEAR, _ADDMM = torch.ops.aten.linear.default, torch.ops.aten.addmm.default


class _Layer(NamedTuple):
    """An adapted or packed layer in a graph: its nodes in order, and their operands."""

    nodes: tuple[fx.Node, ...]  # the nodes, from the layer's own call to its output with the adapters
    x: fx.Node  # the layer's input
    dropped: fx.Node | None  # the adapter's input after dropout; None without dropout
    weight: Any  # the weight; for a packed one, the nested operands that unpack it
    bias: Any
    terms: tuple[tuple[fx.Node, fx.Node, float, fx.Node | None], ...]  # for each adapter: A, B, the scale and its rows


def fuse_adapted_linears(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Compute each adapted or packed layer by one node, which shares the gradient of an input that several read.

    Before: `q = linear(x, wq); q_1 = accumulate(q, project(x, aq), bq, s); k = linear(x, wk); k_1 = accumulate(...)`
    After:  `shared = share_input(x); q_1 = adapted_linear(x, None, wq, None, [aq], [bq], [s], [None], shared);
            k_1 = adapted_linear(x, None, wk, None, [ak], [bk], [s], [None], shared)`

    A layer between whose nodes something else may write is left as it is. By row, each adapter is an entry with its
    rows.
    """
    found: list[_Layer] = []
    taken: set[fx.Node] = set()
    for node in reversed(graph.nodes):  # the last of a layer's nodes first
        if node not in taken and (layer := _layer(node)) is not None and _is_undisturbed(layer):
            found.append(layer)
            taken.update(layer.nodes)
    groups: dict[fx.Node, list[_Layer]] = {}
    for layer in reversed(found):
        groups.setdefault(layer.x, []).append(layer)
    shared, fused = dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()
    for layer in reversed(found):
        if len(groups[layer.x]) > 1 and layer.x not in shared:
            with graph.inserting_before(layer.nodes[0]):
                shared[layer.x] = graph.call_function(share_input, (fused.get(layer.x, layer.x),))
            shared[layer.x].meta = dict(layer.nodes[0].meta)
        fused[layer.nodes[-1]] = _replace(graph, layer, fused, shared.get(layer.x))
    return PassResult(len(found))


def _is_undisturbed(layer: _Layer) -> bool:
    """Return whether nothing else may write between a layer's first node and its last, so that one can replace them."""
    node, last = (
        next((node for node in layer.nodes[0].all_input_nodes if is_unpacked(node)), layer.nodes[0]),
        layer.nodes[-1],
    )
    while node is not last:
        if node not in layer.nodes and may_write(node):
            return False
        node = node.next
    return True


def _layer(result: fx.Node) -> _Layer | None:
    """Return the layer whose output a node is; None if it is a float layer without adapter, or is read elsewhere."""
    if result.target is accumulate:
        return _adapted(result, [(result, None)])
    if result.target is set_rows and not result.kwargs and len(result.args) == 3:
        return _adapted(result, list(zip(*result.args[2:0:-1], strict=True)))  # type: ignore[arg-type]
    return _adapted(result, [])


def _adapted(result: fx.Node, parts: Sequence[tuple[fx.Node, fx.Node | None]]) -> _Layer | None:
    """Return the layer behind an output node, given the ends of its chains of adapter outputs, and their rows."""
    nodes: list[fx.Node] = []
    terms: list[Any] = []
    linears: set[Any] = set() if parts else {result}
    reads: set[Any] = set()
    for value, rows in parts:
        y: Any = value
        added: list[Any] = []
        while getattr(y, "target", None) is accumulate and y.args[1].target is project and not y.kwargs:
            added.append(y)
            y = y.args[0]
        read = [node.args[1].args[0] for node in added]
        if rows is not None:
            if any(getattr(x, "target", None) is not take_rows or x.args[1:] != (rows,) for x in (y, *read)):
                return None
            nodes += [y, *read]
            y, read = y.args[0], [x.args[0] for x in read]
        linears.add(y)
        reads.update(read)
        for node in reversed(added):
            _, projected, B, scale = node.args
            nodes += [projected, node]
            terms.append((projected.args[1], B, scale, rows))
    operands = _product(next(iter(linears)))
    if operands is None or len(linears) != 1 or len(reads) > 1:
        return None
    (linear,), (x, weight, bias) = linears, operands
    members = {linear, result, *nodes}
    is_read = any(user not in members for node in members - {result} for user in node.users)
    if is_read or not (terms or isinstance(weight, tuple)):
        return None
    dropped = next((read for read in reads if read is not x), None)
    order = [linear, *(node for node in dict.fromkeys(nodes) if node is not result)]
    order += [result] if result is not linear else []
    return _Layer(tuple(order), x, dropped, weight, bias, tuple(terms))


def _product(linear: Any) -> tuple[fx.Node, Any, Any] | None:
    """Return the input, weight and bias of a layer's own call; None for any other node."""
    target = getattr(linear, "target", None)
    if target is _LINEAR:
        x, weight, bias = (*linear.args, None)[:3]
        is_turned = False
    elif target is _ADDMM and not linear.kwargs:  # transformers' Conv1D
        bias, x, weight = linear.args
        is_turned = True
    else:
        return None
    if is_unpacked(weight) and weight.args:  # in few bits, not read from a file
        return x, (weight.target, weight.args, is_turned), bias
    return None if is_turned else (x, weight, bias)


def _replace(graph: fx.Graph, layer: _Layer, fused: Mapping[fx.Node, fx.Node], shared: fx.Node | None) -> fx.Node:
    """Compute a layer by one node, at the place of its last one; `fused` are the nodes of others before it."""
    last = layer.nodes[-1]
    columns = [list(column) for column in zip(*layer.terms, strict=True)] or [[], [], [], []]
    arguments: Any = (layer.x, layer.dropped, layer.weight, layer.bias, *columns)
    with graph.inserting_before(last):
        made = graph.call_function(adapted_linear, (*fx.map_arg(arguments, lambda node: fused.get(node, node)), shared))
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    packed = [node for node in layer.nodes[0].all_input_nodes if is_unpacked(node)]
    for node in (*reversed(layer.nodes), *packed):
        if not node.users:
            graph.erase_node(node)
    return made


@without_effect
def share_input(x: Tensor) -> SharedInput | None:
    """Return what the layers that read `x` add its gradient to; None where each returns it by itself."""
    from gralora_fx.core.adapters.adapted_linear import SharedInput

    return SharedInput.of(x) if x.requires_grad and torch.is_grad_enabled() and _is_plain(x) else None


@without_effect
def adapted_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Sequence[Rows | None],
    shared: SharedInput | None = None,
) -> Tensor:
    """Compute an adapted layer: `accumulate(linear(x, weight, bias), project(dropped, A), B, scale)`.

    `x` is `[..., in]`, and `dropped` is it after dropout, or None; `weight` is `[out, in]`, or what unpacks it. There
    is one of `As`, `Bs`, `scales` and `rows`, of the first axis or None for all, for each adapter. `shared` is made by
    `share_input` of `x`.
    """
    from gralora_fx.core.adapters.adapted_linear import AdaptedLinear, compute_layer

    terms = tuple(zip(scales, rows, strict=True))
    if not _is_plain(x, dropped, weight, bias, *As, *Bs):
        return compute_layer(x, x if dropped is None else dropped, weight, bias, terms, As, Bs)[0]
    if shared is not None and shared.version != x._version:  # it was written since
        shared = None
    token = None if shared is None else shared.token
    weights = (None, weight) if isinstance(weight, Tensor) else (weight, None)
    return AdaptedLinear.apply(x, dropped, token, shared, terms, *weights, bias, *As, *Bs)  # type: ignore[no-any-return,no-untyped-call]


def _is_plain(*operands: Any) -> bool:
    """Return whether operands are plain tensors of one dtype, outside compilers, transforms and modes."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and not tensors[0].is_meta  # meta tensors have no autocast state
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not is_transformed()
        and not is_forward_mode()
    )
