"""Padding of elementwise operators whose last digits depend on where a value lies in its tensor."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder, static_dim
from gralora_fx.graph.pipeline import PassResult

VECTOR = 4  # values: the width of Eigen's vectors in the builds of ONNX Runtime
OPERATORS = {"Cos", "Sin", "Log", "Softplus", "Mish"}  # whose last digits depend on a value's place in a vector or none


def fill_vectors(model: ir.Model) -> PassResult[ir.Model]:
    """Pad the last axis of what Eigen computes, so that a row's bits do not depend on the rows beside it.

    Before: `y = Cos(x)`, `x [..., 6]`
    After:  `y = Cos(Pad(x))[..., :6]`, `Pad(x) [..., 8]`

    The values after a tensor's last whole vector are computed one by one, by a function with other last digits. Where a
    row is a multiple of a vector, there are none.

    Args:
        model: A translated model; it is changed in place.

    Returns:
        The number of operators.
    """
    count = 0
    padded: dict[tuple[ir.Graph | ir.Function, ir.Value], ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        width = _width(node) if node.op_type in OPERATORS and not node.domain else None
        if width is None or width % VECTOR == 0:
            continue
        graph, x = node.graph, node.inputs[0]
        assert isinstance(graph, ir.Graph)
        assert x is not None
        build = Builder(graph)
        if (graph, x) not in padded:
            padded[graph, x] = build("Pad", x, build.ints(0, -width % VECTOR), None, build.ints(-1))
        whole = build(node.op_type, padded[graph, x])
        build.replace(node, build("Slice", whole, build.ints(0), build.ints(width), build.ints(-1)))
        count += 1
    return PassResult(count)


def _width(node: ir.Node) -> int | None:
    """The size of the last axis of what an operator of one input takes and gives, if it is known."""
    ends = [value for value in (*node.inputs, *node.outputs) if value is not None and value.shape]
    return next((size for value in ends if (size := static_dim(value, -1)) is not None), None)
