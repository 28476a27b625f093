"""Nodes that torchlib writes in the form of opset 18, in that of later opsets."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder
from gralora_fx.exporters.pipeline import PassResult

_MODES = {"bilinear": "linear", "bicubic": "cubic"}


def update_forms(model: ir.Model) -> PassResult[ir.Model]:
    """Rewrite nodes whose form changed in opset 20, in place.

    Before: `DFT(x, length, axis=1)`, `GridSample(x, grid, mode="bilinear")`
    After:  `DFT(x, length, 1)`, `GridSample(x, grid, mode="linear")`

    Args:
        model: A model of opset 20 or later, its functions inlined.
    """
    count = 0
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "DFT" and "axis" in node.attributes:
            _axis_as_input(node)
            count += 1
        elif node.domain == "" and node.op_type == "GridSample" and "mode" in node.attributes:
            mode = node.attributes["mode"].as_string()
            if mode in _MODES:
                node.attributes["mode"] = ir.AttrString("mode", _MODES[mode])
                count += 1
    return PassResult(count)


def _axis_as_input(node: ir.Node) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    build = Builder(graph)
    axis = build.scalar(node.attributes["axis"].as_int())
    build.insert_before(node)
    node.resize_inputs(3)
    node.replace_input_with(2, axis)
    del node.attributes["axis"]
