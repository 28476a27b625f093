"""Passes over products with float matrices: transposes folded, products merged; and vectors padded."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.exporters.rules.attention.pack_qkv import concat_initializers
from gralora_fx.exporters.rules.builder import Builder, attributes_of, const_ints, replace_value, static_dim
from gralora_fx.exporters.rules.onnx_pipeline import FLOAT_MATRICES, FOLDED_TRANSPOSES, OWN_WEIGHTS
from gralora_fx.exporters.translation.weights import transposed_tensor


@contract(needs={FLOAT_MATRICES}, leaves={FOLDED_TRANSPOSES})
def fold_transposes(model: ir.Model) -> PassResult[ir.Model]:
    """Fold the transposes of weights that are only read transposed into their initializers.

    Before: `y = MatMul(x, Transpose(w))`
    After:  `y = MatMul(x, w)`, with `w` stored `[in, out]`; one with other readers stays, so that it is stored once
    """
    count = 0
    for value in list(model.graph.initializers.values()):
        users = [usage.node for usage in value.uses()]
        tensor = value.const_value
        is_matrix = tensor is not None and len(tensor.shape) == 2
        if not is_matrix or len(users) != 1 or not _transposes(users[0]) or value.is_graph_output():
            continue
        (node,) = users
        assert tensor is not None
        value.const_value = transposed_tensor(value.name, tensor)
        value.shape = value.const_value.shape
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        model.graph.remove(node, safe=True)
        count += 1
    return PassResult(count)


def _transposes(node: ir.Node) -> bool:
    """Return whether a node swaps the two axes of a matrix."""
    order = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return node.op_type == "Transpose" and (order is None or list(order.as_ints()) == [1, 0])


@contract(needs={FLOAT_MATRICES, FOLDED_TRANSPOSES}, ends={OWN_WEIGHTS})
def merge_matmuls(model: ir.Model) -> PassResult[ir.Model]:
    """Merge matmuls of one tensor, with weights of equal width, into one matmul with their concatenation.

    Before: `gate = MatMul(x, Wg); up = MatMul(x, Wu)`
    After:  `gate, up = Split(MatMul(x, [Wg Wu]))`
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
    for part, node in zip(build.split(product, len(nodes), axis=-1), nodes, strict=True):
        replace_value(part, node.outputs[0])
    build.insert_before(nodes[0])
    graph.remove(nodes, safe=True)


def part_transposes(model: ir.Model) -> PassResult[ir.Model]:
    """Part products of half precision from transposes of rows: ONNX Runtime 1.32 crashes as it fuses the two.

    Before: `y = MatMul(Transpose(x, perm=[1, 0, 2]), w)`
    After:  `y = MatMul(Reshape(Transpose(x, perm=[1, 0, 2]), [0, 0, 0]), w)`
    """
    count = 0
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        order = node.attributes["perm"].as_ints() if node.op_type == "Transpose" and "perm" in node.attributes else ()
        if len(order) < 3 or [*order] != [*range(1, len(order) - 1), 0, len(order) - 1]:
            continue
        dtypes = (
            value.dtype for value in (*node.outputs, *node.inputs) if value is not None and value.dtype is not None
        )
        if next(dtypes, None) != ir.DataType.FLOAT16:
            continue
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        build = Builder(graph)
        rows = build("Transpose", node.inputs[0], perm=order)
        build.replace(node, build("Reshape", rows, [0] * len(order)))
        count += 1
    return PassResult(count)


VECTOR = 4  # values: the width of Eigen's vectors in the builds of ONNX Runtime
OPERATORS = {"Cos", "Sin", "Log", "Softplus", "Mish"}  # last digits depend on whether a value lies in a whole vector
SUMS = {"ReduceSum", "ReduceMean"}  # last digits depend on the alignment of a row


def fill_vectors(model: ir.Model) -> PassResult[ir.Model]:
    """Pad the last axis of what Eigen computes, so that a row's bits do not depend on the rows beside it.

    Before: `y = Cos(x)`, `z = ReduceSum(x, axes=[-1])`, `x [..., 6]`
    After:  `y = Cos(Pad(x))[..., :6]`, `z = ReduceSum(Pad(x), axes=[-1])`, `Pad(x) [..., 8]`

    Eigen computes the values after a tensor's last whole SIMD vector with another function, which differs in the last
    digits, and sums a row one by one up to its first vector-aligned address. Rows of whole vectors have neither
    remainder.
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
            padded[graph, x] = build("Pad", x, [0, -width % VECTOR], None, [-1])
        whole = build(node.op_type, padded[graph, x], *node.inputs[1:], **attributes_of(node))
        if node.op_type in OPERATORS:
            whole = build("Slice", whole, [0], [width], [-1])
        elif node.op_type == "ReduceMean":
            assert x.dtype is not None
            whole = build("Mul", whole, build.tensor((width + -width % VECTOR) / width, x.dtype))
        build.replace(node, whole)
        count += 1
    return PassResult(count)


def _width(node: ir.Node) -> int | None:
    """Return the last axis' size of an elementwise operator's input or output, if it is known."""
    ends = [value for value in (*node.inputs, *node.outputs) if value is not None and value.shape]
    return next((size for value in ends if (size := static_dim(value, -1)) is not None), None)


def _summed_width(node: ir.Node) -> int | None:
    """Return the size of the rows that a reduction adds; None if it is unknown or at most 2, where one order exists."""
    x, axes = node.inputs[0] if node.inputs else None, const_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type not in SUMS or x is None or x.shape is None or x.dtype is None or not x.dtype.is_floating_point():
        return None
    width = static_dim(x, -1) if axes in ([-1], [len(x.shape) - 1]) else None
    return width if width is not None and width > 2 else None
