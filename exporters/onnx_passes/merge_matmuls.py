"""Products of one tensor with several weights as one product: a quantized input is then quantized once."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder, known_size, take_place
from gralora_fx.exporters.onnx_passes.pack_qkv import side_by_side
from gralora_fx.exporters.pipeline import PassResult


def join_products(model: ir.Model) -> PassResult[ir.Model]:
    """Multiply a tensor once with weights of one width that are laid side by side.

    Before: `gate = MatMul(x, Wg); up = MatMul(x, Wu)`
    After:  `gate, up = Split(MatMul(x, [Wg Wu]))`

    Args:
        model: A translated model; it is changed in place, its nodes sorted.

    Returns:
        How many products went.
    """
    groups: dict[tuple[ir.Value, int, ir.DataType | None], list[ir.Node]] = {}
    for node in model.graph:
        x, weight = (*node.inputs, None, None)[:2]
        if node.op_type != "MatMul" or node.domain or x is None or weight is None or not weight.is_initializer():
            continue
        width = known_size(weight, -1)
        if width is not None and weight.shape is not None and len(weight.shape) == 2 and len(weight.uses()) == 1:
            groups.setdefault((x, width, weight.dtype), []).append(node)
    joint = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in joint:
        _join(model.graph, nodes)
    return PassResult(sum(len(nodes) - 1 for nodes in joint))


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    build = Builder(graph)
    weights = [node.inputs[1] for node in nodes]
    whole = build("MatMul", nodes[0].inputs[0], side_by_side(graph, [w for w in weights if w is not None]))
    parts = build.node("Split", [whole], num_outputs=len(nodes), axis=-1)
    parts.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(nodes))
    for part, node in zip(parts.outputs, nodes, strict=True):
        take_place(part, node.outputs[0])
    build.insert_before(nodes[0])
    graph.remove(nodes, safe=True)
