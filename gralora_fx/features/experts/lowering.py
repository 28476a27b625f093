"""Lowering of experts to ONNX Runtime: one `MoE` per layer, or a loop over the experts with tokens.

Layers whose experts are not one operator in a trace are listed in the report.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from torch import fx

from gralora_fx.core.graph.module_tree import innermost_path
from gralora_fx.core.graph.pipeline import PassResult, Skip
from gralora_fx.exporters.reports import LayersReport
from gralora_fx.exporters.rules.builder import MICROSOFT, Builder, fixed_dim
from gralora_fx.exporters.translation.names import layer_of
from gralora_fx.exporters.translation.weights import StackedTensor, derived, entries_of
from gralora_fx.features.experts.gate import GATE_NOTE, HALVES, NO_GATE, ExpertGate
from gralora_fx.features.experts.loop import ExpertsNode, loop_over_experts, weighted, width_of
from gralora_fx.features.experts.rows import MOE, arranged, is_read_twice

_WHY = "no operator computes what is between its products, so that each of its experts is a product of its own"


def note_experts(graph: fx.Graph) -> PassResult[fx.Graph]:
    """List the layers whose experts are grouped products, each with the reason; the graph is unchanged."""
    products = [node for node in graph.nodes if node.op == "call_function" and "grouped_mm" in str(node.target)]
    layers = dict.fromkeys(innermost_path(node) or node.name for node in products)
    skipped = tuple(Skip(layer, _WHY) for layer in layers)
    return PassResult(0, skipped, summary=ExpertsReport(0, dict(skipped)) if skipped else None)


class ExpertsReport(LayersReport):
    """Layers whose experts are one operator, and why others are not: a loop, or separate products."""

    FIELD = "experts"
    FUSED, PLAIN = "layers with one operator each", "without"


_STEP = 1e20  # factor that makes any sigmoid 0 or 1
UNGATED = {"silu": "silu", "relu": "relu", "gelu_tanh": "gelu", "identity": "identity"}  # the operator's names
_ARRANGED = "gralora_experts"  # key in the metadata of a value: how it was arranged


@dataclass(frozen=True)
class LowerExperts:
    """Compute each layer's experts with ONNX Runtime's operator if it computes the same.

    Before: `y = gralora.Experts(x, index, weights, up, down)`
    After:  `y = weights @ MoE(<x once for each of its experts>, OneHot(index), up, down, k=1)`, for each token

    Each token is repeated once per expert, and each row has one expert, whose weight is 1 however the operator treats
    scores. So every kind of router is exact: the model's own nodes choose and weigh.

    Rows of gates and linear parts are interleaved, as the operator reads them. `relu` of a gate is the gate times
    `sigmoid(1e20 * gate)`; `relu2` also takes the gate as linear part, so its rows are stored twice.
    """

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Lower every layer, in place; layers computed by a loop are skipped. The summary is an `ExpertsReport`."""
        fused, skipped = 0, []
        for node, experts in ExpertsNode.all_in(model.graph.all_nodes()):
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            build, attributes = Builder(graph), moe_attributes(experts.gate)
            experts = _with_weights_of_none(build, experts)
            reason = attributes if isinstance(attributes, str) else _problem(experts)
            if isinstance(attributes, str) or reason is not None:
                skipped.append(Skip(layer_of(node), f"{reason}, so its experts are computed in a loop, in floats"))
                build.replace(node, loop_over_experts(build, experts, f"{node.outputs[0].name}.loop"))
            else:
                build.replace(node, _routed(build, experts, attributes, node))
                fused += 1
        report = ExpertsReport(fused, dict(skipped)) if fused or skipped else None
        return PassResult(fused, tuple(skipped), summary=report)


LOWER_EXPERTS = LowerExperts()


def moe_attributes(gate: ExpertGate) -> dict[str, Any] | str:
    """Return the attributes of `MoE` and `QMoE` for a gate, or why they cannot compute it."""
    if gate.layout == NO_GATE and gate.activation in UNGATED and gate.alpha == 1:
        return {"activation_type": UNGATED[gate.activation]}
    is_step = gate.activation == ("relu2" if gate.layout == NO_GATE else "relu")
    if not is_step and (gate.layout == NO_GATE or gate.activation != "silu"):
        return f"ONNX Runtime's operator has no {gate.activation}{'' if gate.layout == NO_GATE else ' of a gate'}"
    attributes: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": _STEP if is_step else gate.alpha,
        "activation_beta": gate.offset,
    }
    return attributes | ({"swiglu_limit": gate.limit} if gate.limit else {})


def _with_weights_of_none(build: Builder, experts: ExpertsNode) -> ExpertsNode:
    """Replace out-of-range expert ids by the last expert, with weight 0.

    Ids from a TopK over one score per expert are in range already.
    """
    count, choice = fixed_dim(experts.up, 0), experts.index.producer()
    scores = None if choice is None or choice.op_type != "TopK" else choice.inputs[0]
    if scores is not None and scores.shape is not None and scores.shape[-1] == count:
        return experts
    weights, dtype = experts.weights, experts.weights.dtype or ir.DataType.FLOAT
    kept = build("Where", build("Less", experts.index, count), weights, build.tensor(0, dtype))
    kept.type, kept.shape = weights.type, weights.shape
    index = build("Min", experts.index, count - 1)
    index.type, index.shape = experts.index.type, experts.index.shape
    return ExpertsNode(**{**vars(experts), "index": index, "weights": kept})


def _operands(experts: ExpertsNode) -> dict[str, ir.Value]:
    """Return weights and biases by name, without missing ones."""
    values = {name: getattr(experts, name) for name in ("up", "up_bias", "down", "down_bias")}
    return {name: value for name, value in values.items() if value is not None}


def _problem(experts: ExpertsNode) -> str | None:
    """Return why weights cannot be stored as the operator reads them; None if they can."""
    for value in _operands(experts).values():
        if not value.is_initializer() or value.const_value is None:
            return "weights are computed in the graph"
        if any(use.node.op_type not in (ExpertsNode.op_type, MOE) for use in value.uses()):
            return f"{value.name} has other readers"
    return None


def _routed(build: Builder, experts: ExpertsNode, attributes: dict[str, Any], node: ir.Node) -> ir.Value:
    """Return the weighted sums of the operator's outputs for the tokens' rows."""
    hidden, dtype = experts.hidden, experts.hidden.dtype or ir.DataType.FLOAT
    count, k, size = fixed_dim(experts.up, 0), fixed_dim(experts.index, 1), width_of(experts)
    for name, value in _operands(experts).items():
        _arrange(value, experts, is_up=name.startswith("up"), is_bias=name.endswith("bias"))
    chosen = build("Reshape", experts.index, [-1])
    scores = build("OneHot", chosen, count, build.tensor([0, 1], dtype), axis=-1)
    rows = hidden
    if k > 1:
        each = build("Expand", build("Unsqueeze", hidden, [1]), [1, k, 1])
        rows = build("Reshape", each, [-1, size])
    operands = [rows, scores, experts.up, experts.up_bias, experts.down, experts.down_bias]
    product = build.node(MOE, operands, domain=MICROSOFT, k=1, normalize_routing_weights=1, **attributes)
    product.metadata_props.update(
        {**node.metadata_props, GATE_NOTE: f"{experts.gate.activation} {experts.gate.layout}"}
    )
    product.outputs[0].type = hidden.type
    return weighted(build, product.outputs[0], experts, k, size)


def _arrange(value: ir.Value, experts: ExpertsNode, *, is_up: bool, is_bias: bool) -> None:
    """Store a weight or a bias in the operator's order; layers that share one rearrange it once."""
    tensor, gate = value.const_value, experts.gate
    is_transposed = bool(experts.is_transposed) and not is_bias
    key = (gate, is_up, is_transposed)
    is_same = not is_transposed and not (is_up and (gate.layout == HALVES or is_read_twice(gate)))
    if is_same or value.meta.get(_ARRANGED) == key:
        return
    assert tensor is not None

    def entries() -> Iterator[NDArray[Any]]:
        one = functools.partial(arranged, gate=gate, is_up=is_up, is_transposed=is_transposed)
        return map(one, entries_of(tensor))  # unlike a generator, map keeps no matrix while it reads the next

    sizes = [int(size) for size in tensor.shape.numpy()]
    if is_transposed:
        sizes[1:] = sizes[:0:-1]
    sizes[1] *= 2 if is_up and is_read_twice(gate) else 1
    make = functools.partial(StackedTensor, value.name, tensor.dtype, ir.Shape(sizes), entries)
    value.const_value = derived([tensor], ("experts", *key), make)
    value.shape, value.meta[_ARRANGED] = value.const_value.shape, key
