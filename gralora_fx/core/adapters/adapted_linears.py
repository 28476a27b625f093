"""Adapted layers that read one input, as one node of the graph that runs in training.

Autograd's own derivatives make a tensor as wide as the layer for each product of each layer, copy it between the layout
of blocks `[k, T, out/k]` and that of the layer `[T, out]`, and add them up. Here products are computed in the layer's
own layout, gradients of the input are accumulated into one tensor, and what A makes of the input, k times as wide as
LoRA's, is computed again where keeping it costs much memory. Multiplying by the factors A of all layers at once was
measured and saves nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import is_mutable, is_transformed
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.methods.low_rank import accumulate, in_blocks, project, swapped

_KEPT = 4  # hidden values that are more than 1/4 of the input are computed again instead of kept
_LINEAR = torch.ops.aten.linear.default


class _Layer(NamedTuple):
    """An adapted layer of a graph: its nodes, and what they read."""

    linear: fx.Node
    projected: fx.Node
    result: fx.Node
    x: fx.Node
    dropped: fx.Node | None
    operands: tuple[Any, Any, Any, Any]  # weight, bias, A, B
    scale: float


def join_adapted_linears(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Compute adapted layers that read one input by one node, at the place of the first.

    Before: `q = linear(x, wq); q_1 = accumulate(q, project(x, aq), bq, s); k = linear(x, wk); k_1 = accumulate(...)`
    After:  `q_1, k_1 = adapted_linears(x, None, [wq, wk], [None, None], [aq, ak], [bq, bk], [s, s])`

    Layers whose adapters drop inputs are a node each, since every one draws its own.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    writes = [places[node] for node in graph.nodes if is_mutable(node.target)]
    groups: list[list[_Layer]] = []
    for node in graph.find_nodes(op="call_function", target=accumulate):
        if (layer := _layer(node)) is not None:
            group = next((group for group in groups if _joins(layer, group[0], places, writes)), None)
            groups.append([layer]) if group is None else group.append(layer)
    for layers in groups:
        _replace(graph, layers)
    return PassResult(len(groups))


def adapted_linears(
    x: Tensor,
    dropped: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, ...]:
    """Compute adapted layers of one input: `accumulate(linear(x, weight, bias), project(dropped, A), B, scale)` each.

    Args:
        x: The layers' input, `[..., in]`.
        dropped: The input of their adapters, after dropout; None where it is `x`.
        weights: The layers' weights, `[out, in]`.
        biases: Their biases, `[out]`, or None.
        As: The first factors, as for `project`.
        Bs: The second factors, as for `accumulate`.
        scales: Factors of the updates.
    """
    read = x if dropped is None else dropped
    if not _is_plain(x, dropped, *weights, *biases, *As, *Bs):
        return _outputs(x, read, weights, biases, As, Bs, scales)[0]
    return _AdaptedLinears.apply(x, dropped, scales, *weights, *biases, *As, *Bs)  # type: ignore[no-any-return,no-untyped-call]


def _outputs(
    x: Tensor,
    read: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return what layers compute, and their hidden values."""
    hidden = [project(read, A) for A in As]
    own = (nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return tuple(map(accumulate, own, hidden, Bs, scales)), hidden


class _AdaptedLinears(torch.autograd.Function):
    """`adapted_linears`, whose gradients of `x` are accumulated into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, scales: Sequence[float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = _columns(tensors, 4)
        outputs, hidden = _outputs(x, x if dropped is None else dropped, weights, biases, As, Bs, scales)
        kept = (part if _KEPT * part.numel() <= x.numel() else None for part in hidden)
        ctx.save_for_backward(x, dropped, *weights, *As, *Bs, *kept)
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, dropped, *tensors = ctx.saved_tensors
        of_input, of_dropped, _, *needed = ctx.needs_input_grad
        read, trains = x if dropped is None else dropped, _columns(needed, 4)
        layers = list(zip(gradients, *_columns(tensors, 4), ctx.scales, *trains[:2], strict=True))
        of_x = of_read = None
        found: list[tuple[Tensor | None, ...]] = []
        for gradient, weight, A, B, hidden, scale, trains_weight, trains_bias in layers:
            if gradient is None:
                found.append((None,) * 4)
                continue
            rows = gradient.reshape(-1, gradient.shape[-1])
            if hidden is None or torch.is_grad_enabled():  # for derivatives of these gradients, which must reach A
                hidden = project(read, A)
            if of_input:
                of_x = torch.mm(rows, weight) if of_x is None else of_x.addmm_(rows, weight)
            if of_dropped and of_read is None:
                of_read = rows.new_zeros(rows.shape[0], read.shape[-1])
            of_A, of_B = _add_gradients(of_x if dropped is None else of_read, read, rows, A, B, hidden, scale)
            of_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if trains_weight else None
            found.append((of_weight, rows.sum(0) if trains_bias else None, of_A, of_B))
        of_x, of_read = (None if gradient is None else gradient.view(x.shape) for gradient in (of_x, of_read))
        return of_x, of_read, None, *(gradient for column in zip(*found, strict=True) for gradient in column)


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


def _is_plain(*operands: Tensor | None) -> bool:
    """Return whether operands are computed with as they are: by no compiler, transform or mode, in one dtype."""
    tensors = [tensor for tensor in operands if tensor is not None]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and not tensors[0].is_meta  # which has no autocast to ask about
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not is_transformed()
    )


def _layer(result: fx.Node) -> _Layer | None:
    """Return the adapted layer whose output a node is; None where something else reads the layer's own output."""
    linear, projected, B, scale = result.args
    if result.kwargs or not isinstance(linear, fx.Node) or not isinstance(projected, fx.Node):
        return None
    if linear.target is not _LINEAR or projected.target is not project or {*linear.users, *projected.users} != {result}:
        return None
    (x, weight, bias), (read, A) = (*linear.args, None)[:3], projected.args
    return _Layer(linear, projected, result, x, None if read is x else read, (weight, bias, A, B), scale)  # type: ignore[arg-type]


def _joins(layer: _Layer, first: _Layer, places: Mapping[fx.Node, int], writes: Sequence[int]) -> bool:
    """Return whether a layer can be computed at the place of another one."""
    if layer.x is not first.x or layer.dropped is not None or first.dropped is not None:
        return False
    begin, end = places[first.linear], places[layer.result]
    operands = (*layer.operands, *first.operands)
    known = all(node is None or node.op == "get_attr" or places[node] < begin for node in operands)
    return known and not any(begin < place < end for place in writes)


def _replace(graph: fx.Graph, layers: Sequence[_Layer]) -> None:
    """Compute layers by one node."""
    place = layers[0].result if len(layers) == 1 else layers[0].linear
    operands: Any = list(zip(*(layer.operands for layer in layers), strict=True))
    with graph.inserting_before(place):
        operands = [[_read_here(graph, node) if len(layers) > 1 else node for node in column] for column in operands]
        arguments = (layers[0].x, layers[0].dropped, *operands, [layer.scale for layer in layers])
        joined = graph.call_function(adapted_linears, arguments)
        joined.meta = dict(layers[0].linear.meta)
        for index, layer in enumerate(layers):
            output = graph.call_function(operator.getitem, (joined, index))
            output.meta = dict(layer.result.meta)
            layer.result.replace_all_uses_with(output)
    for layer in layers:
        for node in (layer.result, layer.projected, layer.linear):
            graph.erase_node(node)


def _read_here(graph: fx.Graph, node: fx.Node | None) -> fx.Node | None:
    """Return a node that reads the same attribute at the insertion point; another node as it is."""
    return node if node is None or node.op != "get_attr" else graph.node_copy(node)
