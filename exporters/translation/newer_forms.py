"""Nodes that torchlib writes in the form of opset 18, in that of later opsets."""

from __future__ import annotations

import onnx_ir as ir

_MODES = {"bilinear": "linear", "bicubic": "cubic"}


def update_forms(model: ir.Model) -> None:
    """Rewrite nodes whose form changed in opset 20, in place.

    Before: `DFT(x, length, axis=1)`, `GridSample(x, grid, mode="bilinear")`
    After:  `DFT(x, length, 1)`, `GridSample(x, grid, mode="linear")`

    Args:
        model: A model of opset 20 or later, its functions inlined.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "DFT" and "axis" in node.attributes:
            _axis_as_input(node)
        elif node.domain == "" and node.op_type == "GridSample" and "mode" in node.attributes:
            mode = node.attributes["mode"].as_string()
            if mode in _MODES:
                node.attributes["mode"] = ir.AttrString("mode", _MODES[mode])


def _axis_as_input(node: ir.Node) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    axis = ir.node("Constant", [], {"value_int": node.attributes["axis"].as_int()})
    graph.insert_before(node, axis)
    node.resize_inputs(3)
    node.replace_input_with(2, axis.outputs[0])
    del node.attributes["axis"]
