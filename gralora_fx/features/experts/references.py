"""What an export's experts are compared with: their blocks as floats, in the model and in a copy of the export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.fold.requantize import stored_values
from gralora_fx.exporters.rules.builder import MICROSOFT, add_initializer, attributes_of, replace_value
from gralora_fx.exporters.rules.products.constant_matrices import drop_unread
from gralora_fx.exporters.rules.products.initializers import ProductWeight, Reader, Storage, stored_scales
from gralora_fx.exporters.translation.weights import StackedTensor, derived
from gralora_fx.features.experts.blocks import MATRICES, OF_BLOCKS, QMOE, expert_matrices
from gralora_fx.features.experts.operators import Experts
from gralora_fx.features.experts.rows import MOE, arranged, as_modelled

_FOUR = 4


def rounded_experts(directory: Path, reference: TracedModel) -> tuple[dict[int, nn.Parameter], int]:
    """What an export holds in blocks of a model's experts, where those may be rounded to it."""
    layers = list(Experts.all_in(reference.graph_module.graph))
    weights: dict[str, ProductWeight] = {}
    for path in sorted(directory.glob("*.onnx")) if layers else ():
        weights |= {name: w for name, w in expert_weights(ir.load(path).graph).items() if w.storage == "blocks"}
    rounded: dict[int, nn.Parameter] = {}
    for _, experts in layers:
        for (name, own), is_up in zip(expert_matrices(reference, experts).items(), (True, False), strict=False):
            if name not in weights:
                continue
            held, parts = stored_values(weights[name]), []
            for index, matrix in enumerate(own.detach().numpy()):
                rows = arranged(matrix, experts.gate, is_up=is_up, is_transposed=experts.is_transposed)
                outputs = slice(index * len(rows), (index + 1) * len(rows))
                rows = held.values(outputs) if held.is_rounded(rows, outputs) else rows
                parts.append(as_modelled(rows, experts.gate, is_up=is_up, is_transposed=experts.is_transposed))
            rounded[id(own)] = nn.Parameter(torch.from_numpy(np.stack(parts)), requires_grad=False)
    return rounded, sum(weight.out_features * weight.in_features for weight in weights.values())


def experts_in_floats(model: ir.Model) -> None:
    """Let experts multiply by what their blocks stand for, in float32, activations not rounded; in place.

    Before: `y = QMoE(x, scores, up_Q8, up_scales, up_bias, down_Q8, down_scales, down_bias)`
    After:  `y = MoE(x, scores, up, up_bias, down, down_bias)`; of 4 bits `QMoE` computes so by its accuracy level
    """
    weights = {weight.name: (name, weight) for name, weight in expert_weights(model.graph).items()}
    for node in list(model.graph.all_nodes()):
        if (node.domain, node.op_type) != (MICROSOFT, QMOE):
            continue
        if node.attributes["expert_weight_bits"].as_int() == _FOUR:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
            continue
        graph, inputs = node.graph, [*node.inputs, None]
        assert isinstance(graph, ir.Graph)
        operands = list(inputs[:2])
        for at, _ in MATRICES[QMOE]:
            name, weight = weights[str(getattr(inputs[at], "name", None))]
            operands += [_floats(model.graph, name, weight), inputs[at + 2]]
        attributes = {name: value for name, value in attributes_of(node).items() if name not in OF_BLOCKS}
        new = ir.node(MOE, operands, attributes, domain=MICROSOFT, version=1)
        replace_value(new.outputs[0], node.outputs[0])
        graph.insert_before(node, new)
        graph.remove(node, safe=True)
        drop_unread(model.graph, [str(value.name) for value in inputs if value is not None and value.is_initializer()])


def _floats(graph: ir.Graph, name: str, weight: ProductWeight) -> ir.Value:
    """An initializer of what blocks stand for, in the scales' dtype."""
    tensor, scales = weight.value.const_value, weight.scales
    assert tensor is not None
    assert scales is not None
    dtype = ir.DataType.FLOAT if weight.is_widened or scales.dtype is None else scales.dtype
    experts = int(tensor.shape.numpy()[0])
    outputs = weight.out_features // experts

    def entries() -> Iterator[NDArray[np.float32]]:
        held = stored_values(weight)
        for index in range(experts):
            yield held.values(slice(index * outputs, (index + 1) * outputs)).astype(dtype.numpy())

    shape = ir.Shape([experts, outputs, weight.in_features])
    made = derived([tensor], "floats of experts", lambda: StackedTensor(name, dtype, shape, entries))
    return graph.initializers.get(name) or add_initializer(graph, made)


def expert_weights(graph: ir.Graph) -> dict[str, ProductWeight]:
    """The matrices of the experts of a graph, by the names of the parameters that they were.

    A stack `[experts, out, in]` is a weight of `experts * out` output features, rows in the order in which the operator
    reads them (see `arranged` and `as_modelled`).
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
    value, scales, zero_points, is_widened = inputs[at], None, None, False
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    experts, outputs, width = (int(size) for size in value.const_value.shape.numpy())
    bits = block_size = 0
    if node.op_type == QMOE:
        bits, block_size = (node.attributes[name].as_int() for name in ("expert_weight_bits", "block_size"))
        width, scales, zero_points = width * 8 // bits, stored_scales(inputs[at + 1]), inputs[zeros]
        is_widened = scales is not inputs[at + 1]
    storage: Storage = "float" if node.op_type == MOE else "blocks"
    readers = (Reader(node, at),)
    return ProductWeight(
        value, storage, False, width, experts * outputs, readers, (), scales, is_widened, zero_points, block_size,
        bits,
    )  # fmt: skip
