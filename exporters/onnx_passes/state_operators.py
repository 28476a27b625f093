"""Layers that keep a state in place of keys and values, as the runtime's own operators: a line each in `_LOWERED`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import MICROSOFT, Builder, fixed_dim, replace_value
from gralora_fx.exporters.translation.operators import CausalConvNode, DomainNode, GatedRmsNormNode, LinearAttentionNode
from gralora_fx.graph.pipeline import PassResult

_RULES = {  # whether there is a decay, and a beta
    (False, False): "linear",
    (True, False): "gated",
    (False, True): "delta",
    (True, True): "gated_delta",
}


def lower_state_operators(model: ir.Model) -> PassResult[ir.Model]:
    """Replace operators that carry a state, and the norm beside them, by the runtime's.

    Before: `y, next = LinearAttention(query, key, value, decay, beta, state)`, heads and their sizes apart
    After:  `y, next = com.microsoft.LinearAttention(query, key, value, state, decay, beta)`, heads in one axis

    Args:
        model: The model; it is changed in place.

    Returns:
        The number of operators replaced.
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
            changed += 1
    return PassResult(changed)


def _linear_attention(build: Builder, taken: LinearAttentionNode) -> tuple[ir.Value, ...]:
    heads, size = (fixed_dim(taken.value, axis) for axis in (2, 3))
    queries = fixed_dim(taken.query, 2)
    packed = [_packed(build, value) for value in (taken.query, taken.key, taken.value)]
    decay, beta = (_cast(build, value, taken.query) for value in (taken.decay, taken.beta))
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
    return build("Reshape", y, build.ints(0, 0, max(queries, heads), size)), state


def _causal_conv(build: Builder, taken: CausalConvNode) -> tuple[ir.Value, ...]:
    inputs = [taken.x, taken.weight, taken.bias, taken.state]
    activation = "silu" if taken.silu else "none"
    fused = build.node("CausalConvWithState", inputs, domain=MICROSOFT, num_outputs=2, activation=activation)
    return tuple(fused.outputs)


def _gated_norm(build: Builder, taken: GatedRmsNormNode) -> tuple[ir.Value, ...]:
    inputs, activation = (taken.x, taken.weight, taken.gate), "silu" if taken.silu else "sigmoid"
    return (build("GatedRMSNorm", *inputs, domain=MICROSOFT, epsilon=taken.eps, activation=activation),)


def _packed(build: Builder, value: ir.Value) -> ir.Value:
    """`[batch, length, heads * size]` of `[batch, length, heads, size]`: what it is a view of, where that is known."""
    width = fixed_dim(value, 2) * fixed_dim(value, 3)
    producer = value.producer()
    before = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else None
    if before is not None and before.shape is not None and len(before.shape) == 3 and before.shape[2] == width:
        return before
    packed = build("Reshape", value, build.ints(0, 0, width))
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
