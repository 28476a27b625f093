"""Slices of one tensor that lie side by side, as one `Split`."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.rules.builder import Builder, const_ints, replace_value, static_dim


def join_slices(graph: ir.Graph, source: ir.Value) -> bool:
    """Replace slices that together are a whole tensor by one node, in place.

    ONNX Runtime does so itself, but not below a transpose, which it moves into each slice.

    Before: `a = Slice(x, 0, n); b = Slice(x, n, m)` along one axis
    After:  `a, b = Split(x, [n, m - n])`
    """
    found = [_piece(usage.node) for usage in source.uses() if usage.idx == 0]
    pieces = sorted((piece for piece in found if piece is not None), key=lambda piece: piece[1:])
    if len(pieces) < 2 or len({axis for _, axis, _, _ in pieces}) > 1:
        return False
    axis = pieces[0][1]
    limits = [0, *[end for _, _, _, end in pieces]]
    if [start for _, _, start, _ in pieces] != limits[:-1] or static_dim(source, axis) != limits[-1]:
        return False
    build = Builder(graph)
    sizes = build.ints(*[end - start for _, _, start, end in pieces])
    split = build.node("Split", [source, sizes], num_outputs=len(pieces), axis=axis)
    build.insert_after(source)
    for (node, _, _, _), part in zip(pieces, split.outputs, strict=True):
        replace_value(part, node.outputs[0])
        graph.remove(node, safe=True)
    return True


def _piece(node: ir.Node) -> tuple[ir.Node, int, int, int] | None:
    """The node, its axis, its start and its end, of a slice along one axis; None of any other node."""
    if node.op_type != "Slice" or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    start, end, axis, step = (const_ints(value) for value in (*node.inputs[1:], None, None)[:4])
    if start is None or end is None or axis is None or len(axis) != 1 or step not in (None, [1]):
        return None
    size = static_dim(node.inputs[0], axis[0])
    if size is None or start[0] < 0 or end[0] < 0:
        return None
    return node, axis[0] % len(node.inputs[0].shape), start[0], min(end[0], size)
