"""Adapted layers that read one input, as one node of the graph that runs in training.

Autograd's own derivatives make a tensor as wide as the layer for each product of each layer, copy it between the layout
of blocks `[k, T, out/k]` and that of the layer `[T, out]`, and add them up. Here products are computed in the layer's
own layout, gradients of the input are accumulated into one tensor, and what A makes of the input, k times as wide as
LoRA's, is computed again where keeping it costs much memory. Multiplying by the factors A of all layers at once was
measured and saves nothing.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import is_mutable, is_transformed
from gralora_fx.core.adapters.adapter_rows import Rows, set_rows, take_rows
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.methods.low_rank import accumulate, in_blocks, project, swapped

_KEPT = 4  # hidden values that are more than 1/4 of the input are computed again instead of kept
_LINEAR = torch.ops.aten.linear.default
_Term = tuple[int, float, Rows | None]  # of an adapter: the place of its layer, its scale and its rows


class _Layer(NamedTuple):
    """An adapted layer of a graph: its nodes in order, and what they read.

    Attributes:
        nodes: The nodes, of which the first is the layer's own call and the last gives its output with the adapters.
        x: Its input.
        dropped: The input of its adapter after dropout, where there is some.
        weight: Its weight.
        bias: Its bias.
        terms: Of each adapter, A, B, the scale and the rows that it is for.
    """

    nodes: tuple[fx.Node, ...]
    x: fx.Node
    dropped: fx.Node | None
    weight: Any
    bias: Any
    terms: tuple[tuple[fx.Node, fx.Node, float, fx.Node | None], ...]


def join_adapted_linears(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Compute adapted layers that read one input by one node, at the place of the first.

    Before: `q = linear(x, wq); q_1 = accumulate(q, project(x, aq), bq, s); k = linear(x, wk); k_1 = accumulate(...)`
    After:  `q_1, k_1 = adapted_linears(x, None, [wq, wk], [None] * 2, [0, 1], [aq, ak], [bq, bk], [s, s], [None] * 2)`

    Layers whose adapters drop inputs are a node each, since every one draws its own. Of layers with an adapter a row
    each adapter is an entry, with its rows (see `adapter_rows`).
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


def adapted_linears(
    x: Tensor,
    dropped: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    adapted: Sequence[int],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    rows: Sequence[Rows | None],
) -> tuple[Tensor, ...]:
    """Compute adapted layers of one input: `accumulate(linear(x, weight, bias), project(dropped, A), B, scale)` each.

    Args:
        x: The layers' input, `[..., in]`.
        dropped: The input of their adapters, after dropout; None where it is `x`.
        weights: The layers' weights, `[out, in]`.
        biases: Their biases, `[out]`, or None.
        adapted: The place of the layer of each adapter.
        As: The first factors, as for `project`.
        Bs: The second factors, as for `accumulate`.
        scales: Factors of the updates.
        rows: The rows of the first axis that each adapter is for; None for all.
    """
    read = x if dropped is None else dropped
    terms = tuple(zip(adapted, scales, rows, strict=True))
    if not _is_plain(x, dropped, *weights, *biases, *As, *Bs):
        return _outputs(x, read, weights, biases, terms, As, Bs)[0]
    return _AdaptedLinears.apply(x, dropped, terms, len(weights), *weights, *biases, *As, *Bs)  # type: ignore[no-any-return,no-untyped-call]


def _outputs(
    x: Tensor,
    read: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    terms: Sequence[_Term],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return what layers compute, and the hidden values of their adapters."""
    outputs = [nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    hidden = [project(_of(read, rows), A) for (_, _, rows), A in zip(terms, As, strict=True)]
    by_row: list[dict[int, tuple[Rows, Tensor]]] = [{} for _ in weights]  # by the identity of the rows
    for (layer, scale, rows), part, B in zip(terms, hidden, Bs, strict=True):
        if rows is None:
            outputs[layer] = accumulate(outputs[layer], part, B, scale)
        else:
            _, y = by_row[layer].get(id(rows)) or (rows, outputs[layer][rows])
            by_row[layer][id(rows)] = rows, accumulate(y, part, B, scale)
    for layer, values in enumerate(by_row):
        if values:
            chosen, written = zip(*values.values(), strict=True)
            outputs[layer] = set_rows(outputs[layer], chosen, written)
    return tuple(outputs), hidden


class _AdaptedLinears(torch.autograd.Function):
    """`adapted_linears`, whose gradients of `x` are accumulated into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, terms: Sequence[_Term], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = _columns(tensors, count, len(terms))
        outputs, hidden = _outputs(x, x if dropped is None else dropped, weights, biases, terms, As, Bs)
        kept = (
            part if _KEPT * part.numel() <= _of(x, rows).numel() else None
            for (_, _, rows), part in zip(terms, hidden, strict=True)
        )
        ctx.save_for_backward(x, dropped, *weights, *As, *Bs, *kept)
        ctx.terms, ctx.count = terms, count
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, dropped, *tensors = ctx.saved_tensors
        of_input, of_dropped, _, _, *needed = ctx.needs_input_grad
        weights, factors = tensors[: ctx.count], tensors[ctx.count :]
        trains, read = (needed[: ctx.count], needed[ctx.count : 2 * ctx.count]), x if dropped is None else dropped
        of_x = of_read = None
        of_weights: list[Tensor | None] = [None] * ctx.count
        of_biases = list(of_weights)
        for place, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            if gradient is None:
                continue
            flat = gradient.reshape(-1, gradient.shape[-1])
            if of_input:
                of_x = torch.mm(flat, weight) if of_x is None else of_x.addmm_(flat, weight)
            of_weights[place] = flat.t() @ x.reshape(-1, x.shape[-1]) if trains[0][place] else None
            of_biases[place] = flat.sum(0) if trains[1][place] else None
        if of_dropped and any(gradient is not None for gradient in gradients):
            of_read = x.new_zeros(x.numel() // x.shape[-1], x.shape[-1])
        into = of_x if dropped is None else of_read
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for (place, scale, rows), A, B, hidden in zip(
            ctx.terms, *_columns(factors, *[len(ctx.terms)] * 3), strict=True
        ):
            gradient = gradients[place]
            if gradient is None:
                found.append((None, None))
                continue
            own = _of(read, rows)
            if hidden is None or torch.is_grad_enabled():  # for derivatives of these gradients, which must reach A
                hidden = project(own, A)
            flat = _of(gradient, rows).reshape(-1, gradient.shape[-1])
            if into is None:
                found.append(_add_gradients(None, own, flat, A, B, hidden, scale))
                continue
            whole = into.view(x.shape)
            part = _of(whole, rows)
            found.append(_add_gradients(part.view(-1, x.shape[-1]), own, flat, A, B, hidden, scale))
            if isinstance(rows, Tensor):  # of a copy, not of a view
                whole[rows] = part
        of_x, of_read = (None if gradient is None else gradient.view(x.shape) for gradient in (of_x, of_read))
        of_factors = (gradient for column in zip(*found, strict=True) for gradient in column)
        return of_x, of_read, None, None, *of_weights, *of_biases, *of_factors


def _of(value: Tensor, rows: Rows | None) -> Tensor:
    """Return the rows of a value: a view of it, but where they are given by indices."""
    return value if rows is None else value[rows]


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


def _columns(tensors: Sequence[Any], *lengths: int) -> list[Sequence[Any]]:
    """Divide tensors into columns: of one length each; of two lengths given, two columns of each."""
    ends = [*itertools.accumulate(lengths if len(lengths) != 2 else [n for n in lengths for _ in range(2)])]
    return [tensors[start:end] for start, end in zip([0, *ends], ends, strict=False)]


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
    if result.target is accumulate:
        return _adapted(result, [(result, None)])
    if result.target is set_rows and not result.kwargs and len(result.args) == 3:
        return _adapted(result, list(zip(*result.args[2:0:-1], strict=True)))  # type: ignore[arg-type]
    return None


def _adapted(result: fx.Node, parts: Sequence[tuple[fx.Node, fx.Node | None]]) -> _Layer | None:
    """Return the layer of a node, of the values that adapters' outputs are added up to, and their rows."""
    nodes: list[fx.Node] = []
    terms: list[Any] = []
    linears: set[Any] = set()
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
    if len(linears) != 1 or len(reads) != 1:
        return None
    (linear,), (read_by_all,) = linears, reads
    if not isinstance(linear, fx.Node) or linear.target is not _LINEAR:
        return None
    members = {linear, result, *nodes}
    if any(user not in members for node in members - {result} for user in node.users):
        return None
    arguments: Any = (*linear.args, None)
    x, weight, bias = arguments[:3]
    order = (linear, *(node for node in dict.fromkeys(nodes) if node is not result), result)
    return _Layer(order, x, None if read_by_all is x else read_by_all, weight, bias, tuple(terms))


def _joins(layer: _Layer, first: _Layer, places: Mapping[fx.Node, int], writes: Sequence[int]) -> bool:
    """Return whether a layer can be computed at the place of another one."""
    if layer.x is not first.x or layer.dropped is not None or first.dropped is not None:
        return False
    begin, end = places[first.nodes[0]], places[layer.nodes[-1]]
    operands = [
        node for each in (layer, first) for node in (each.weight, each.bias, *(n for t in each.terms for n in t))
    ]
    known = all(not isinstance(node, fx.Node) or node.op == "get_attr" or places[node] < begin for node in operands)
    return known and not any(begin < place < end for place in writes)


def _replace(graph: fx.Graph, layers: Sequence[_Layer]) -> None:
    """Compute layers by one node."""
    first = layers[0]
    place = first.nodes[-1] if len(layers) == 1 else first.nodes[0]
    terms = [(index, *term) for index, layer in enumerate(layers) for term in layer.terms]
    with graph.inserting_before(place):
        adapted, *columns = (list(column) for column in zip(*terms, strict=True))
        tensors: Any = [[layer.weight for layer in layers], [layer.bias for layer in layers], *columns[:2]]
        if len(layers) > 1:
            tensors = [[_read_here(graph, node) for node in column] for column in tensors]
        arguments = (first.x, first.dropped, *tensors[:2], adapted, *tensors[2:], *columns[2:])
        joined = graph.call_function(adapted_linears, arguments)
        joined.meta = dict(first.nodes[0].meta)
        for index, layer in enumerate(layers):
            output = graph.call_function(operator.getitem, (joined, index))
            output.meta = dict(layer.nodes[-1].meta)
            layer.nodes[-1].replace_all_uses_with(output)
    for layer in layers:
        for node in (*reversed(layer.nodes),):
            graph.erase_node(node)


def _read_here(graph: fx.Graph, node: fx.Node | None) -> fx.Node | None:
    """Return a node that reads the same attribute at the insertion point; another node as it is."""
    return node if node is None or node.op != "get_attr" else graph.node_copy(node)
