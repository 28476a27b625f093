"""Experts' matrices in ONNX models, as the weights of one product each: all experts' rows below each other."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.folding.initializers import ProductWeight, Reader, Storage
from gralora_fx.exporters.onnx_passes.builder import MICROSOFT
from gralora_fx.exporters.onnx_passes.expert_blocks import MATRICES, QMOE
from gralora_fx.exporters.onnx_passes.expert_rows import MOE


def expert_weights(graph: ir.Graph) -> dict[str, ProductWeight]:
    """The matrices of the experts of a graph, by the names of the parameters that they were.

    A stack `[experts, out, in]` is a weight of `experts * out` output features, rows in the order in which the operator
    reads them (see `arranged` and `as_modelled`).

    Args:
        graph: A model's graph; weights are not read.
    """
    weights: dict[str, ProductWeight] = {}
    for node in graph.all_nodes():
        if node.domain == MICROSOFT and node.op_type in MATRICES:
            for place in MATRICES[node.op_type]:
                weight = _weight(node, *place)
                if weight is not None:
                    weights.setdefault(weight.name.removesuffix(f"_Q{weight.bits}"), weight)
    return weights


def _weight(node: ir.Node, at: int, zeros: int) -> ProductWeight | None:
    inputs = [*node.inputs, *[None] * (zeros + 1 - len(node.inputs))]
    value, scales, zero_points = inputs[at], None, None
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    experts, outputs, width = (int(size) for size in value.const_value.shape.numpy())
    bits = block_size = 0
    if node.op_type == QMOE:
        bits, block_size = (node.attributes[name].as_int() for name in ("expert_weight_bits", "block_size"))
        width, scales, zero_points = width * 8 // bits, inputs[at + 1], inputs[zeros]
    storage: Storage = "float" if node.op_type == MOE else "blocks"
    readers = (Reader(node, at),)
    return ProductWeight(
        value, storage, False, width, experts * outputs, readers, (), scales, zero_points, block_size, bits
    )
