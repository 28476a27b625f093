"""Adapted layers that read one input, as one node of the graph that runs in training.

Autograd's own derivatives make a tensor as wide as the layer for each product of each layer, copy it between the layout
of blocks `[k, T, out/k]` and that of the layer `[T, out]`, and add them up. Here products are computed in the layer's
own layout, gradients of the input are accumulated into one tensor, and what A makes of the input, k times as wide as
LoRA's, is computed again where keeping it costs much memory. Multiplying by the factors A of all layers at once was
measured and saves nothing. A weight in few bits is unpacked for each product, and never kept: it is given as what
computes it, a tuple of the operator, its arguments, and whether the result is `[in, out]`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import is_mutable, is_transformed
from gralora_fx.core.graph.linear_calls import is_unpacked
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.methods.low_rank import accumulate, in_blocks, project, swapped

_KEPT = 4  # hidden values that are more than 1/4 of the input are computed again instead of kept
_LINEAR, _ADDMM = torch.ops.aten.linear.default, torch.ops.aten.addmm.default


class _Layer(NamedTuple):
    """A layer of a graph, adapted or in few bits: its nodes, and what they read."""

    linear: fx.Node
    projected: fx.Node | None
    result: fx.Node
    x: fx.Node
    dropped: fx.Node | None
    operands: tuple[Any, Any, Any, Any]  # weight, bias, A, B
    scale: float


def join_adapted_linears(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Compute layers that read one input, adapted or in few bits, by one node at the place of the first.

    Before: `q = linear(x, wq); q_1 = accumulate(q, project(x, aq), bq, s); k = linear(x, wk); k_1 = accumulate(...)`
    After:  `q_1, k_1 = adapted_linears(x, None, [wq, wk], [None, None], [aq, ak], [bq, bk], [s, s])`

    Layers whose adapters drop inputs are a node each, since every one draws its own.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    writes = [places[node] for node in graph.nodes if is_mutable(node.target)]
    groups: list[list[_Layer]] = []
    for node in places:
        if (layer := _layer(node)) is not None:
            group = next((group for group in groups if _joins(layer, group[0], places, writes)), None)
            groups.append([layer]) if group is None else group.append(layer)
    for layers in groups:
        _replace(graph, layers)
    return PassResult(len(groups))


def adapted_linears(
    x: Tensor,
    dropped: Tensor | None,
    weights: Sequence[Tensor | tuple[Any, ...]],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    scales: Sequence[float],
) -> tuple[Tensor, ...]:
    """Compute adapted layers of one input: `accumulate(linear(x, weight, bias), project(dropped, A), B, scale)` each.

    Args:
        x: The layers' input, `[..., in]`.
        dropped: The input of their adapters, after dropout; None where it is `x`.
        weights: The layers' weights, `[out, in]`, or what unpacks them.
        biases: Their biases, `[out]`, or None.
        As: The first factors, as for `project`; None of a layer without an adapter.
        Bs: The second factors, as for `accumulate`, or None.
        scales: Factors of the updates.
    """
    read = x if dropped is None else dropped
    if not _is_plain(x, dropped, *weights, *biases, *As, *Bs):
        return _outputs(x, read, weights, biases, As, Bs, scales)[0]
    floats = (weight if isinstance(weight, Tensor) else None for weight in weights)
    return _AdaptedLinears.apply(x, dropped, weights, scales, *floats, *biases, *As, *Bs)  # type: ignore[no-any-return,no-untyped-call]


def _values(weight: Tensor | tuple[Any, ...]) -> Tensor:
    """Return a weight `[out, in]`; one in few bits is unpacked."""
    if isinstance(weight, Tensor):
        return weight
    unpack, arguments, is_turned = weight
    values: Tensor = unpack(*arguments)
    return values.t() if is_turned else values


def _outputs(
    x: Tensor,
    read: Tensor,
    weights: Sequence[Tensor | tuple[Any, ...]],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    scales: Sequence[float],
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Return what layers compute, and their hidden values."""
    hidden = [None if A is None else project(read, A) for A in As]
    own = (nn.functional.linear(x, _values(weight), bias) for weight, bias in zip(weights, biases, strict=True))
    layers = zip(own, hidden, Bs, scales, strict=True)
    return tuple(y if part is None or B is None else accumulate(y, part, B, s) for y, part, B, s in layers), hidden


class _AdaptedLinears(torch.autograd.Function):
    """`adapted_linears`, whose gradients of `x` are accumulated into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weights: Sequence[Any], scales: Sequence[float], *tensors: Any
    ) -> tuple[Tensor, ...]:
        floats, biases, As, Bs = _columns(tensors, 4)
        outputs, hidden = _outputs(x, x if dropped is None else dropped, weights, biases, As, Bs, scales)
        kept = (part if part is not None and _KEPT * part.numel() <= x.numel() else None for part in hidden)
        ctx.save_for_backward(x, dropped, *floats, *As, *Bs, *kept)
        ctx.packed = [None if isinstance(weight, Tensor) else weight for weight in weights]
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, dropped, *tensors = ctx.saved_tensors
        of_input, of_dropped, _, _, *needed = ctx.needs_input_grad
        read, trains = x if dropped is None else dropped, _columns(needed, 4)
        layers = list(zip(gradients, ctx.packed, *_columns(tensors, 4), ctx.scales, *trains[:2], strict=True))
        of_x = of_read = None
        found: list[tuple[Tensor | None, ...]] = []
        for gradient, packed, weight, A, B, hidden, scale, trains_weight, trains_bias in layers:
            if gradient is None:
                found.append((None,) * 4)
                continue
            rows = gradient.reshape(-1, gradient.shape[-1])
            if of_input:
                values = _values(weight if packed is None else packed)
                of_x = torch.mm(rows, values) if of_x is None else of_x.addmm_(rows, values)
                del values  # of a packed weight, before the next one is unpacked
            of_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if trains_weight else None
            of_bias = rows.sum(0) if trains_bias else None
            if A is None:
                found.append((of_weight, of_bias, None, None))
                continue
            if hidden is None or torch.is_grad_enabled():  # for derivatives of these gradients, which must reach A
                hidden = project(read, A)
            if of_dropped and of_read is None:
                of_read = rows.new_zeros(rows.shape[0], read.shape[-1])
            of_A, of_B = _add_gradients(of_x if dropped is None else of_read, read, rows, A, B, hidden, scale)
            found.append((of_weight, of_bias, of_A, of_B))
        of_x, of_read = (None if gradient is None else gradient.view(x.shape) for gradient in (of_x, of_read))
        return of_x, of_read, None, None, *(gradient for column in zip(*found, strict=True) for gradient in column)


def _add_gradients(
    into: Tensor | None, read: Tensor, rows: Tensor, A: Tensor, B: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both factors, and add that of their input to a tensor.

    Args:
        into: The gradient of `read` so far, `[T, in]`; None if it is not needed.
        read: The input, `[..., in]`.
        rows: The gradient of the output, `[T, out]`.
        A: The first factor, as for `project`.
        B: The second factor, as for `accumulate`.
        hidden: What `project` gave.
        scale: Factor of the update.
    """
    if A.ndim == 2:
        of_hidden = torch.mm(rows, B).mul_(scale)
        if into is not None:
            into.addmm_(of_hidden, A)
        return torch.mm(of_hidden.t(), read.reshape(-1, A.shape[1])), torch.mm(rows.t(), hidden).mul_(scale)
    k = A.shape[0]
    blocks = in_blocks(rows, k)
    of_hidden = swapped(torch.bmm(blocks, B.transpose(1, 2)).mul_(scale))
    if into is not None:
        in_blocks(into, k).baddbmm_(of_hidden, A.transpose(1, 2))
    of_B = torch.bmm(hidden.transpose(1, 2), blocks).mul_(scale)
    return torch.bmm(in_blocks(read, k).transpose(1, 2), of_hidden), of_B


def _columns(tensors: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Divide tensors into columns of one length."""
    length = len(tensors) // count
    return [tensors[start : start + length] for start in range(0, len(tensors), length)]


def _is_plain(*operands: Any) -> bool:
    """Return whether operands are computed with as they are: by no compiler, transform or mode, in one dtype."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and not tensors[0].is_meta  # which has no autocast to ask about
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not is_transformed()
    )


def _layer(linear: fx.Node) -> _Layer | None:
    """Return the layer whose product a node is; None of one in floats that has no adapter, or is read elsewhere."""
    if linear.target is _LINEAR:
        (x, weight, bias), is_turned = (*linear.args, None)[:3], False
    elif linear.target is _ADDMM and not linear.kwargs:
        (bias, x, weight), is_turned = linear.args, True  # of transformers' Conv1D
    else:
        return None
    operand: Any = (weight.target, weight.args, is_turned) if is_unpacked(weight) else weight  # type: ignore[union-attr]
    if is_turned and operand is weight:
        return None
    result = next(iter(linear.users)) if len(linear.users) == 1 else linear
    if result.target is accumulate and not result.kwargs and result.args[0] is linear:
        projected, B, scale = result.args[1:]
        if isinstance(projected, fx.Node) and projected.target is project and set(projected.users) == {result}:
            read, A = projected.args
            operands = (operand, bias, A, B)
            return _Layer(linear, projected, result, x, None if read is x else read, operands, scale)  # type: ignore[arg-type]
    return None if operand is weight else _Layer(linear, None, linear, x, None, (operand, bias, None, None), 1.0)  # type: ignore[arg-type]


def _joins(layer: _Layer, first: _Layer, places: Mapping[fx.Node, int], writes: Sequence[int]) -> bool:
    """Return whether a layer can be computed at the place of another one."""
    if layer.x is not first.x or layer.dropped is not None or first.dropped is not None:
        return False
    begin, end = places[first.linear], places[layer.result]
    known = all(node.op == "get_attr" or places[node] < begin for node in _read([layer.operands, first.operands]))
    return known and not any(begin < place < end for place in writes)


def _replace(graph: fx.Graph, layers: Sequence[_Layer]) -> None:
    """Compute layers by one node."""
    place = layers[0].result if len(layers) == 1 else layers[0].linear
    operands: Any = list(zip(*(layer.operands for layer in layers), strict=True))
    with graph.inserting_before(place):
        if len(layers) > 1:  # attributes are read again, before the first layer
            operands = fx.map_arg(operands, lambda node: graph.node_copy(node) if node.op == "get_attr" else node)
        arguments = (layers[0].x, layers[0].dropped, *operands, [layer.scale for layer in layers])
        joined = graph.call_function(adapted_linears, arguments)
        joined.meta = dict(layers[0].linear.meta)
        for index, layer in enumerate(layers):
            output = graph.call_function(operator.getitem, (joined, index))
            output.meta = dict(layer.result.meta)
            layer.result.replace_all_uses_with(output)
    for layer in layers:
        packed = [node for node in layer.linear.all_input_nodes if is_unpacked(node)]
        for node in dict.fromkeys((layer.result, layer.projected, layer.linear, *packed)):
            if node is not None and not node.users:
                graph.erase_node(node)


def _read(operands: Any) -> list[fx.Node]:
    """Return the nodes in nested operands."""
    nodes: list[fx.Node] = []
    fx.map_arg(operands, nodes.append)
    return nodes
