"""Folding of transposes into initializers."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.translation.weights import transposed_tensor
from gralora_fx.graph.pipeline import PassResult


def fold_transposes(model: ir.Model) -> PassResult[ir.Model]:
    """Fold the transposes of weights that are only read transposed into their initializers.

    Before: `y = MatMul(x, Transpose(w))`
    After:  `y = MatMul(x, w)`, with `w` stored `[in, out]`

    A weight with other readers, such as a tied embedding, stays as it is, so that it is stored once.

    Args:
        model: The model; it is changed in place.
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
    """Whether a node swaps the two axes of a matrix."""
    order = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return node.op_type == "Transpose" and (order is None or list(order.as_ints()) == [1, 0])
