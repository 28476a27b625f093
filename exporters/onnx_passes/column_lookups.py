"""Lookups in tables that are stored as the int8 columns of a head that is tied to them."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder


class StoredColumns(NamedTuple):
    """The initializers of a matrix in columns.

    Attributes:
        integers: `[K, N]`, int8.
        scale: `[N]`.
        factors: `[K]`, what its rows are multiplied by; None where there are none.
    """

    integers: ir.Value
    scale: ir.Value
    factors: ir.Value | None


def is_table(value: ir.Value) -> bool:
    """Whether all readers of a matrix `[N, K]` look up its rows."""
    return bool(value.uses()) and all(_is_lookup(use.node) for use in value.uses())


def look_up_columns(table: ir.Value, stored: StoredColumns) -> int:
    """Let lookups in a table `[N, K]` read the columns of its transpose, so that it is stored once.

    Before: `e = Gather(table [N, K], ids)`
    After:  `e = Transpose(Cast(Gather(integers [K, N], ids, axis=1))) * Unsqueeze(Gather(scale, ids), -1) * factors`

    Args:
        table: The table; one with other readers than lookups is left to them.
        stored: The columns of its transpose.

    Returns:
        The number of lookups.
    """
    readers = [use.node for use in table.uses()]
    if not is_table(table):
        return 0
    for node in readers:
        ids, old = node.inputs[1], node.outputs[0]
        assert isinstance(node.graph, ir.Graph)
        assert ids is not None
        assert ids.shape is not None
        build = Builder(node.graph)
        integers = build("Cast", build("Gather", stored.integers, ids, axis=1), to=ir.DataType.FLOAT)
        values = build("Transpose", integers, perm=[*range(1, len(ids.shape) + 1), 0])
        scale = build("Unsqueeze", build("Gather", stored.scale, ids), build.ints(-1))
        found = build("Mul", values, scale)
        found = found if stored.factors is None else build("Mul", found, stored.factors)
        for index, made in enumerate(build.nodes):
            for output in made.outputs:
                output.name = f"{old.name}_int8_{index}"  # names that a branch draws may be taken outside it
        build.replace(node, found)
    return len(readers)


def _is_lookup(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and (axis is None or axis.as_int() == 0)
