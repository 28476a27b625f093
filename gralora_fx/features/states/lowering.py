"""Lowering of the operators of layers with a state to ONNX Runtime's: the table `_LOWERED`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.builder import (
    MICROSOFT,
    SITES,
    Builder,
    const_ints,
    fixed_dim,
    replace_value,
    static_dim,
)
from gralora_fx.exporters.translation.operators import DomainNode
from gralora_fx.features.states.operators import CausalConv, GatedRmsNorm, LinearAttention, PromptClamp


class LinearAttentionNode(DomainNode, LinearAttention[ir.Value]):
    """`LinearAttention`: as `gralora::linear_attention`, with two outputs."""

    op_type = "LinearAttention"


class CausalConvNode(DomainNode, CausalConv[ir.Value]):
    """`CausalConv`: as `gralora::causal_conv`, with two outputs; `silu` is 0 or 1."""

    op_type = "CausalConv"


class GatedRmsNormNode(DomainNode, GatedRmsNorm[ir.Value]):
    """`GatedRMSNorm`: as `gralora::gated_rms_norm`; `silu` is 0 or 1."""

    op_type = "GatedRMSNorm"


class PromptClampNode(DomainNode, PromptClamp[ir.Value]):
    """`PromptClamp`: as `gralora::prompt_clamp`."""

    op_type = "PromptClamp"


NODES = (LinearAttentionNode, CausalConvNode, GatedRmsNormNode, PromptClampNode)


_RULES = {  # whether there is a decay, and a beta
    (False, False): "linear",
    (True, False): "gated",
    (False, True): "delta",
    (True, True): "gated_delta",
}


def lower_state_operators(model: ir.Model) -> PassResult[ir.Model]:
    """Replace operators that carry a state, and the norm beside them, by the runtime's.

    Before: `y, next = LinearAttention(query, key, value, decay, beta, state)`, heads and sizes as separate axes
    After:  `y, next = com.microsoft.LinearAttention(query, key, value, state, decay, beta)`, heads in one axis
    """
    changed = 0
    for kind, lower in _LOWERED.items():
        for node, taken in kind.all_in(model.graph):
            build = Builder(model.graph)
            results = lower(build, taken)
            for new, old in zip(results, node.outputs, strict=True):
                replace_value(new, old)
            build.insert_before(node)
            model.graph.remove(node, safe=True)
            _drop_views(model.graph, results[0])
            changed += 1
    return PassResult(changed)


def _linear_attention(build: Builder, taken: LinearAttentionNode) -> tuple[ir.Value, ...]:
    heads, size = (fixed_dim(taken.value, axis) for axis in (2, 3))
    queries = fixed_dim(taken.query, 2)
    packed = [_packed(build, value) for value in (taken.query, taken.key, taken.value)]
    gates = _decay(build, taken.decay), _beta(build.graph, taken.beta)
    decay, beta = (_cast(build, value, taken.query) for value in gates)
    if decay is not None and len(decay.shape or ()) == 4:
        decay = _packed(build, decay)
    fused = build.node(
        "LinearAttention",
        [*packed, taken.state, decay, beta],
        domain=MICROSOFT,
        num_outputs=2,
        q_num_heads=queries,
        kv_num_heads=heads,
        update_rule=_RULES[decay is not None, beta is not None],
        scale=taken.scale,
    )
    y, state = fused.outputs
    y.shape, y.type = ir.Shape([*list(taken.value.shape or ())[:2], max(queries, heads) * size]), taken.value.type
    return build("Reshape", y, [0, 0, max(queries, heads), size]), state


def _decay(build: Builder, decay: ir.Value | None) -> ir.Value | None:
    """Fuse a decay computed as in the gated delta rule into one operator.

    Before: `decay = Mul(scale, Softplus(Add(a, bias)))`
    After:  `decay = LinearAttentionGate(a, bias, scale)`

    The operator's beta output is not used: it is rounded, unlike that of `_beta`.
    """
    scale, softplus = _vector_first(decay, "Mul")
    rate = None if softplus is None else softplus.producer()
    if decay is None or rate is None or rate.op_type != "Softplus" or len(rate.outputs[0].uses()) > 1:
        return decay
    total = rate.inputs[0]
    bias, a = _vector_first(total, "Add")
    if total is None or a is None or any(v is None or v.dtype != ir.DataType.FLOAT for v in (a, bias, scale)):
        return decay
    if SITES in total.meta:
        a.meta[SITES] = total.meta[SITES]  # adapters are added before the bias
    fused = build("LinearAttentionGate", a, bias, scale, domain=MICROSOFT)
    fused.shape, fused.type = decay.shape, decay.type
    return fused


def _beta(graph: ir.Graph, beta: ir.Value | None) -> ir.Value | None:
    """Return a beta whose small values are exact; the graph is changed in place.

    Before: `beta = Sigmoid(b)`, or `Mul(Sigmoid(b), 2)`
    After:  `beta = Reciprocal(Add(Exp(Neg(b)), 1))`, or its double

    ONNX Runtime's `Sigmoid` has an absolute error of 6e-8, however small the result. For heads with a beta of 1e-5 that
    is a hundredth, and the norm after them magnifies it by up to `1 / sqrt(eps)`.
    """
    node = None if beta is None else beta.producer()
    factors = () if node is None or node.op_type != "Mul" else node.inputs
    for sigmoid in (node, *(value.producer() for value in factors if value is not None)):
        if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.outputs[0].dtype != ir.DataType.FLOAT:
            continue
        build = Builder(graph)
        inverse = build("Add", build("Exp", build("Neg", sigmoid.inputs[0])), build.tensor(1.0, ir.DataType.FLOAT))
        exact = build("Reciprocal", inverse)
        build.replace(sigmoid, exact)
        return exact if sigmoid is node else beta
    return beta


def _vector_first(value: ir.Value | None, op_type: str) -> tuple[ir.Value | None, ir.Value | None]:
    """Return an operator's operands, the 1-D one before the 3-D one; (None, None) for anything else."""
    node = None if value is None else value.producer()
    operands = () if node is None or node.op_type != op_type else node.inputs
    ranks = {len(each.shape): each for each in operands if each is not None and each.shape is not None}
    vector, rows = ranks.get(1), ranks.get(3)
    return (vector, rows) if vector is not None and static_dim(vector, 0) == static_dim(rows, 2) else (None, None)


def _causal_conv(build: Builder, taken: CausalConvNode) -> tuple[ir.Value, ...]:
    gate = taken.x.producer()
    for value in () if gate is None else gate.inputs:
        cut = None if value is None else value.producer()
        if cut is not None and cut.op_type == "Slice" and cut.inputs[0] is not None:
            join_slices(build.graph, cut.inputs[0])
    inputs = [taken.x, taken.weight, taken.bias, taken.state]
    activation = "silu" if taken.silu else "none"
    fused = build.node("CausalConvWithState", inputs, domain=MICROSOFT, num_outputs=2, activation=activation)
    return tuple(fused.outputs)


def _gated_norm(build: Builder, taken: GatedRmsNormNode) -> tuple[ir.Value, ...]:
    """Normalise groups side by side in the last axis, so that no tensor needs reshaping.

    Before: `y = Reshape(GatedRMSNorm(Reshape(x, [-1, size]), weight, Reshape(gate, [-1, size])), shape of x)`
    After:  `y = GatedRMSNorm(x, weight, gate)`
    """
    size, activation = fixed_dim(taken.weight, 0), "silu" if taken.silu else "sigmoid"
    x, gate = taken.x, taken.gate
    for wide, beside in ((a, b) for a in _views(taken.x) for b in _views(taken.gate)):
        fits = _alike(wide, beside) and static_dim(wide, -1) is not None and fixed_dim(wide, -1) % size == 0
        if fits and _sizes(taken.x, wide).count(-1) <= 1:
            x, gate = wide, beside  # the last are views of nothing
    y = build("GatedRMSNorm", x, taken.weight, gate, domain=MICROSOFT, epsilon=taken.eps, activation=activation)
    y.shape, y.type = x.shape, x.type
    return (y if x is taken.x else build("Reshape", y, [*_sizes(taken.x, x)]),)


def _sizes(value: ir.Value, source: ir.Value) -> list[int]:
    """Return a shape for `Reshape`: 0 for an axis of the input's size, -1 for one to be inferred."""
    before = list(source.shape or ())
    return [
        size if isinstance(size, int) else 0 if axis < len(before) and before[axis] == size else -1
        for axis, size in enumerate(value.shape or ())
    ]


def _alike(one: ir.Value, other: ir.Value) -> bool:
    """Return whether two values are known to have the same shape."""
    return one.shape is not None and one.shape == other.shape and not one.shape.has_unknown_dim()


def _views(value: ir.Value) -> Iterator[ir.Value]:
    """Yield a value, and the inputs of the `Reshape` chain that it comes from."""
    yield value
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        yield from _views(producer.inputs[0])


def _drop_views(graph: ir.Graph, value: ir.Value) -> None:
    """Let reshapes of a value read its source directly if that has their shape already."""
    for reader in [usage.node for usage in value.uses()]:
        result = reader.outputs[0]
        same = [source for source in _views(value) if _alike(source, result)]
        if reader.op_type == "Reshape" and same and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, same[0])
            graph.remove(reader, safe=True)


def _packed(build: Builder, value: ir.Value) -> ir.Value:
    """Reshape `[batch, length, heads, size]` to `[batch, length, heads * size]`, reusing the source of a view."""
    width = fixed_dim(value, 2) * fixed_dim(value, 3)
    producer = value.producer()
    before = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else None
    if before is not None and before.shape is not None and len(before.shape) == 3 and before.shape[2] == width:
        return before
    packed = build("Reshape", value, [0, 0, width])
    packed.shape, packed.type = ir.Shape([*list(value.shape or ())[:2], width]), value.type
    return packed


def _cast(build: Builder, value: ir.Value | None, like: ir.Value) -> ir.Value | None:
    if value is None or like.dtype is None or value.dtype == like.dtype:
        return value
    cast = build("Cast", value, to=like.dtype)
    cast.shape = value.shape
    return cast


_LOWERED: dict[type[DomainNode], Callable[[Builder, Any], tuple[ir.Value, ...]]] = {
    LinearAttentionNode: _linear_attention,
    CausalConvNode: _causal_conv,
    GatedRmsNormNode: _gated_norm,
}


def join_slices(graph: ir.Graph, source: ir.Value) -> bool:
    """Replace slices that together cover a tensor by one `Split`, in place.

    ONNX Runtime does so itself, but not below a transpose, which it moves into each slice.

    Before: `a = Slice(x, 0, n); b = Slice(x, n, m)` along one axis
    After:  `a, b = Split(x, [n, m - n])`
    """
    found = [_piece(usage.node) for usage in source.uses() if usage.idx == 0]
    pieces = sorted((piece for piece in found if piece is not None), key=lambda piece: piece[1:])
    if len(pieces) < 2 or len({axis for _, axis, _, _ in pieces}) > 1:
        return False
    axis = pieces[0][1]
    limits = [0, *[end for _, _, _, end in pieces]]
    if [start for _, _, start, _ in pieces] != limits[:-1] or static_dim(source, axis) != limits[-1]:
        return False
    build = Builder(graph)
    sizes = build.ints(*[end - start for _, _, start, end in pieces])
    split = build.node("Split", [source, sizes], num_outputs=len(pieces), axis=axis)
    build.insert_after(source)
    for (node, _, _, _), part in zip(pieces, split.outputs, strict=True):
        replace_value(part, node.outputs[0])
        graph.remove(node, safe=True)
    return True


def _piece(node: ir.Node) -> tuple[ir.Node, int, int, int] | None:
    """Return the node, axis, start and end of a slice along one axis; None for other nodes."""
    if node.op_type != "Slice" or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    start, end, axis, step = (const_ints(value) for value in (*node.inputs[1:], None, None)[:4])
    if start is None or end is None or axis is None or len(axis) != 1 or step not in (None, [1]):
        return None
    size = static_dim(node.inputs[0], axis[0])
    if size is None or start[0] < 0 or end[0] < 0:
        return None
    return node, axis[0] % len(node.inputs[0].shape), start[0], min(end[0], size)
