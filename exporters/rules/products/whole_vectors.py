"""Padding of operators whose last digits depend on where a value, or a row, lies in its tensor."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.builder import Builder, attributes_of, const_ints, static_dim

VECTOR = 4  # values: the width of Eigen's vectors in the builds of ONNX Runtime
OPERATORS = {"Cos", "Sin", "Log", "Softplus", "Mish"}  # whose last digits depend on a value's place in a vector or none
SUMS = {"ReduceSum", "ReduceMean"}  # of rows, whose last digits depend on the place where a row begins


def fill_vectors(model: ir.Model) -> PassResult[ir.Model]:
    """Pad the last axis of what Eigen computes, so that a row's bits do not depend on the rows beside it.

    Before: `y = Cos(x)`, `z = ReduceSum(x, axes=[-1])`, `x [..., 6]`
    After:  `y = Cos(Pad(x))[..., :6]`, `z = ReduceSum(Pad(x), axes=[-1])`, `Pad(x) [..., 8]`

    The values after a tensor's last whole vector are computed one by one, by a function with other last digits. A row
    is added one by one up to the first address of a whole vector, then vector by vector: in another order than a row
    that begins there, such as the weights of six routes of a token. Where a row is a multiple of a vector, there are
    none of either.
    """
    count = 0
    padded: dict[tuple[ir.Graph | ir.Function, ir.Value], ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        width = None if node.domain else _width(node) if node.op_type in OPERATORS else _summed_width(node)
        if width is None or width % VECTOR == 0:
            continue
        graph, x = node.graph, node.inputs[0]
        assert isinstance(graph, ir.Graph)
        assert x is not None
        build = Builder(graph)
        if (graph, x) not in padded:
            padded[graph, x] = build("Pad", x, build.ints(0, -width % VECTOR), None, build.ints(-1))
        whole = build(node.op_type, padded[graph, x], *node.inputs[1:], **attributes_of(node))
        if node.op_type in OPERATORS:
            whole = build("Slice", whole, build.ints(0), build.ints(width), build.ints(-1))
        elif node.op_type == "ReduceMean":
            assert x.dtype is not None
            whole = build("Mul", whole, build.tensor((width + -width % VECTOR) / width, x.dtype))
        build.replace(node, whole)
        count += 1
    return PassResult(count)


def _width(node: ir.Node) -> int | None:
    """The size of the last axis of what an operator of one input takes and gives, if it is known."""
    ends = [value for value in (*node.inputs, *node.outputs) if value is not None and value.shape]
    return next((size for value in ends if (size := static_dim(value, -1)) is not None), None)


def _summed_width(node: ir.Node) -> int | None:
    """The size of the rows that a reduction adds, if it is known; None of two values, which have one order."""
    x, axes = node.inputs[0] if node.inputs else None, const_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type not in SUMS or x is None or x.shape is None or x.dtype is None or not x.dtype.is_floating_point():
        return None
    width = static_dim(x, -1) if axes in ([-1], [len(x.shape) - 1]) else None
    return width if width is not None and width > 2 else None
