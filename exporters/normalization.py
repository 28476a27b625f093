"""Root-mean-square normalisation in the form that ONNX Runtime fuses."""

from __future__ import annotations

import onnx_ir as ir


def divide_by_roots(model: ir.Model) -> int:
    """Divide by a square root instead of multiplying by its reciprocal, as ONNX Runtime's fusion expects.

    Before: `y = Mul(x, Reciprocal(Sqrt(v)))`
    After:  `y = Div(x, Sqrt(v))`

    Loading then turns `Pow, ReduceMean, Add, Sqrt, Div, Mul` into one `SimplifiedLayerNormalization`, with the addition
    before it where there is one.

    Args:
        model: The model; it is changed in place.

    Returns:
        How many products were replaced.
    """
    replaced = 0
    for node in list(model.graph):
        if node.op_type != "Reciprocal" or node.inputs[0] is None:
            continue
        root = node.inputs[0].producer()
        users = [usage.node for usage in node.outputs[0].uses()]
        if root is None or root.op_type != "Sqrt" or any(user.op_type != "Mul" for user in users):
            continue
        for user in users:
            factor = next(value for value in user.inputs if value is not node.outputs[0])
            quotient = ir.node("Div", [factor, root.outputs[0]])
            new, old = quotient.outputs[0], user.outputs[0]
            new.shape, new.type, new.name = old.shape, old.type, old.name
            model.graph.insert_before(user, quotient)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            model.graph.remove(user, safe=True)
            replaced += 1
        model.graph.remove(node, safe=True)
    return replaced
