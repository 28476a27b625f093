"""Adapted or packed layers that read one input, joined into one node of the training graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import is_mutable, is_transformed
from gralora_fx.core.graph.linear_calls import is_unpacked
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.methods.low_rank import accumulate, project, set_rows, take_rows

if TYPE_CHECKING:
    from gralora_fx.core.adapters.adapted_linears import Weight
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


def join_adapted_linears(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Compute adapted or packed layers that read one input by one node, at the place of the first.

    Before: `q = linear(x, wq); q_1 = accumulate(q, project(x, aq), bq, s); k = linear(x, wk); k_1 = accumulate(...)`
    After:  `q_1, k_1 = adapted_linears(x, None, [wq, wk], [None] * 2, [0, 1], [aq, ak], [bq, bk], [s, s], [None] * 2)`

    Layers with dropout are not joined, since each draws its own mask. By row, each adapter is an entry with its rows.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    writes = [places[node] for node in graph.nodes if is_mutable(node.target)]
    found: list[_Layer] = []
    taken: set[fx.Node] = set()
    for node in reversed(graph.nodes):  # the last of a layer's nodes first
        if node not in taken and (layer := _layer(node)) is not None:
            found.append(layer)
            taken.update(layer.nodes)
    groups: list[list[_Layer]] = []
    for layer in reversed(found):
        group = next((group for group in groups if _joins(layer, group[0], places, writes)), None)
        groups.append([layer]) if group is None else group.append(layer)
    for layers in groups:
        _replace(graph, layers)
    return PassResult(len(groups))


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


def _joins(layer: _Layer, first: _Layer, places: Mapping[fx.Node, int], writes: Sequence[int]) -> bool:
    """Return whether a layer can be computed at the place of another one."""
    if layer.x is not first.x or layer.dropped is not None or first.dropped is not None:
        return False
    begin, end = places[first.nodes[0]], places[layer.nodes[-1]]
    operands = _read([(each.weight, each.bias, each.terms) for each in (layer, first)])
    known = all(node.op == "get_attr" or places[node] < begin for node in operands)
    return known and not any(begin < place < end for place in writes)


def _replace(graph: fx.Graph, layers: Sequence[_Layer]) -> None:
    first = layers[0]
    place = first.nodes[-1] if len(layers) == 1 else first.nodes[0]
    terms = [(index, *term) for index, layer in enumerate(layers) for term in layer.terms]
    with graph.inserting_before(place):
        adapted, *columns = (list(column) for column in zip(*terms, strict=True)) if terms else [[] for _ in range(5)]
        tensors: Any = [[layer.weight for layer in layers], [layer.bias for layer in layers], *columns[:2]]
        if len(layers) > 1:  # attributes are read again, before the first layer
            tensors = fx.map_arg(tensors, lambda node: graph.node_copy(node) if node.op == "get_attr" else node)
        arguments = (first.x, first.dropped, *tensors[:2], adapted, *tensors[2:], *columns[2:])
        joined = graph.call_function(adapted_linears, arguments)
        joined.meta = dict(first.nodes[0].meta)
        for index, layer in enumerate(layers):
            output = graph.call_function(operator.getitem, (joined, index))
            output.meta = dict(layer.nodes[-1].meta)
            layer.nodes[-1].replace_all_uses_with(output)
    for layer in layers:
        packed = [node for node in layer.nodes[0].all_input_nodes if is_unpacked(node)]
        for node in (*reversed(layer.nodes), *packed):
            if not node.users:
                graph.erase_node(node)


def _read(operands: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg(operands, nodes.append)
    return nodes


def adapted_linears(
    x: Tensor,
    dropped: Tensor | None,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    adapted: Sequence[int],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Sequence[Rows | None],
) -> tuple[Tensor, ...]:
    """Compute adapted layers of one input: `accumulate(linear(x, weight, bias), project(dropped, A), B, scale)` each.

    `x` is `[..., in]`, and `dropped` is it after dropout, or None. There is one of `weights`, `[out, in]` or what
    unpacks them, and of `biases` for each layer; one of `adapted`, the layer's index, of `As`, `Bs`, `scales` and
    `rows`, of the first axis or None for all, for each adapter.
    """
    from gralora_fx.core.adapters.adapted_linears import AdaptedLinears, compute_layers

    read = x if dropped is None else dropped
    terms = tuple(zip(adapted, scales, rows, strict=True))
    if not _is_plain(x, dropped, *weights, *biases, *As, *Bs):
        return compute_layers(x, read, weights, biases, terms, As, Bs)[0]
    floats = (weight if isinstance(weight, Tensor) else None for weight in weights)
    return AdaptedLinears.apply(x, dropped, terms, weights, *floats, *biases, *As, *Bs)  # type: ignore[no-any-return,no-untyped-call]


def _is_plain(*operands: Any) -> bool:
    """Return whether operands are plain tensors of one dtype, outside compilers, transforms and modes."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and not tensors[0].is_meta  # meta tensors have no autocast state
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not is_transformed()
    )
