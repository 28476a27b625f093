"""Merging of the matmuls of one tensor with several weights: a quantized input is then quantized once."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder, replace_value, static_dim
from gralora_fx.exporters.onnx_passes.pack_qkv import concat_initializers
from gralora_fx.graph.pipeline import PassResult


def merge_matmuls(model: ir.Model) -> PassResult[ir.Model]:
    """Merge matmuls of one tensor with weights of equal width into one over their concatenation.

    Before: `gate = MatMul(x, Wg); up = MatMul(x, Wu)`
    After:  `gate, up = Split(MatMul(x, [Wg Wu]))`

    Args:
        model: A translated model; it is changed in place, its nodes sorted.

    Returns:
        The number of matmuls removed.
    """
    groups: dict[tuple[ir.Value, int, ir.DataType | None], list[ir.Node]] = {}
    for node in model.graph:
        x, weight = (*node.inputs, None, None)[:2]
        if node.op_type != "MatMul" or node.domain or x is None or weight is None or not weight.is_initializer():
            continue
        width = static_dim(weight, -1)
        if width is not None and weight.shape is not None and len(weight.shape) == 2 and len(weight.uses()) == 1:
            groups.setdefault((x, width, weight.dtype), []).append(node)
    joint = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in joint:
        _join(model.graph, nodes)
    return PassResult(sum(len(nodes) - 1 for nodes in joint))


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    build = Builder(graph)
    weights = [node.inputs[1] for node in nodes]
    product = build("MatMul", nodes[0].inputs[0], concat_initializers(graph, [w for w in weights if w is not None]))
    parts = build.node("Split", [product], num_outputs=len(nodes), axis=-1)
    parts.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(nodes))
    for part, node in zip(parts.outputs, nodes, strict=True):
        replace_value(part, node.outputs[0])
    build.insert_before(nodes[0])
    graph.remove(nodes, safe=True)
