"""Rotary position embedding as one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from torch import fx

from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.operators.layers import Reshape, Rotary, Rotate
from gralora_fx.exporters.rules.builder import MICROSOFT, Builder, replace_value, static_dim
from gralora_fx.exporters.rules.onnx_pipeline import ONE_SPELLING, ROTARY_NODES, SIMPLIFIED
from gralora_fx.exporters.translation.matching import (
    ADD,
    MUL,
    aten,
    concat_operands,
    expression,
    is_call,
    last_axis_slice,
    number,
    operands,
    same_size,
    shape,
)
from gralora_fx.exporters.translation.operators import RotaryNode


@contract(needs={SIMPLIFIED, ONE_SPELLING})
def match_rotary(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Rewrite rotary embeddings as one operator each.

    Before: `y = x * cos + cat(-x[..., half:], x[..., :half]) * sin`, or with interleaved pairs instead of halves
    After:  `y = rotary(x, cos[..., :half], sin[..., :half])`

    A partial rotation, of the first part of a head concatenated with the rest, becomes one operator too.
    """
    halves: dict[fx.Node, fx.Node] = {}
    wide: dict[fx.Node, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        match = _rotation(node)
        if match is None:
            continue
        x, *tables, interleaved = match
        if any(_row_source(graph, table.values, x) is None for table in tables):
            continue
        cos, sin = (_in_rows(graph, _half(graph, table, interleaved, halves), x, wide) for table in tables)
        end, x = _with_rest(node, x)
        with graph.inserting_before(end):
            rotated = Rotary(x, cos, sin, interleaved).insert(graph)
        rotated.meta = dict(end.meta)
        end.replace_all_uses_with(rotated)
        count += 1
    graph.eliminate_dead_code()
    return PassResult(count)


def _rotation(node: fx.Node) -> tuple[fx.Node, _Table, _Table, bool] | None:
    """Return `(x, cos, sin, interleaved)` of a rotation; None for anything else."""
    rotate = Rotate.of(node)
    if rotate is not None and rotate.axis in (1, -3):
        cos, sin = (_flat_table(factor, False) for factor in (rotate.cos, rotate.sin))
        return None if cos is None or sin is None else (rotate.x, cos, sin, False)
    terms = operands(node, *ADD)
    if terms is None or len(shape(node)) != 4:
        return None
    for plain, across in (terms, terms[::-1]):
        straight, crossed = operands(plain, *MUL), operands(across, *MUL)
        if straight is None or crossed is None:
            continue
        for quarter, sin in (crossed, crossed[::-1]):
            turn = _quarter_turn(quarter)
            if turn is None or turn[0] not in straight:
                continue
            x, interleaved = turn
            cos = straight[1] if straight[0] is x else straight[0]
            tables = _table(cos, x, interleaved), _table(sin, x, interleaved)
            if tables[0] is not None and tables[1] is not None:
                return x, tables[0], tables[1], interleaved
    return None


def _quarter_turn(node: Any) -> tuple[fx.Node, bool] | None:
    """Return `(x, interleaved)` of a node that swaps each pair of `x` and negates its first member, or None."""
    halves = concat_operands(node)
    if halves is not None and len(halves) == 2 and is_call(halves[0], aten.neg.default):
        second, first = last_axis_slice(halves[0].args[0]), last_axis_slice(halves[1])
        if second is None or first is None or second[0] is not first[0]:
            return None
        size = shape(first[0])[-1]
        fits = first[1:] == (0, size // 2, 1) and second[1:] == (size // 2, size, 1)
        return (first[0], False) if fits else None
    reshape = Reshape.of(node)
    if reshape is None:
        return None
    stack: Any = reshape.x
    if not is_call(stack, aten.stack.default) or stack.args[1:] != (-1,) or len(stack.args[0]) != 2:
        return None
    second, first = stack.args[0]
    if not is_call(second, aten.neg.default):
        return None
    odd, even = last_axis_slice(second.args[0]), last_axis_slice(first)
    if odd is None or even is None or odd[0] is not even[0] or len(shape(node)) != len(shape(even[0])):
        return None
    size = shape(even[0])[-1]
    return (even[0], True) if even[1:] == (0, size, 2) and odd[1:] == (1, size, 2) else None


def _table(node: Any, x: fx.Node, interleaved: bool) -> _Table | None:
    """Return the table of a factor `[batch, 1, length, size]`, if the members of each pair share a value."""
    sizes, expected = shape(node), shape(x)
    if len(sizes) != 4 or expression(sizes[1]) != 1 or not all(same_size(sizes[i], expected[i]) for i in (0, 2, 3)):
        return None
    unsqueezed = is_call(node, aten.unsqueeze.default) and node.args[1] in (1, -3)
    values = node.args[0] if unsqueezed else node
    return _Table(values, unsqueezed) if _is_shared(values, interleaved) else None


def _flat_table(values: Any, interleaved: bool) -> _Table | None:
    """Return the table of values `[batch, length, size]`, if the members of each pair share a value."""
    return _Table(values, True) if len(shape(values)) == 3 and _is_shared(values, interleaved) else None


def _is_shared(values: Any, interleaved: bool) -> bool:
    """Return whether the members of each pair share a value, looking through elementwise operators."""
    source = values
    while is_call(source, aten.cos.default, aten.sin.default, aten._to_copy.default, *MUL):
        if is_call(source, *MUL) and number(source.args[1]) is None:
            return False
        source = source.args[0]
    if interleaved:
        return is_call(source, aten.repeat_interleave.self_int) and source.args[1:] == (2, -1)
    halves = concat_operands(source)
    return halves is not None and len(halves) == 2 and halves[0] is halves[1]


class _Table(NamedTuple):
    """Values `[batch, length, size]`, or `[batch, 1, length, size]` if not `is_flat`."""

    values: fx.Node
    is_flat: bool


def _half(graph: fx.Graph, table: _Table, interleaved: bool, memo: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return the value that the members of each pair share, `[batch, length, half]`, computed once."""
    half = _of_pairs(graph, table.values, interleaved, memo)
    if table.is_flat:
        return half
    if half not in memo:
        with graph.inserting_before(half.next):
            memo[half] = graph.call_function(aten.squeeze.dim, (half, 1))
        memo[half].meta = {**half.meta, "val": half.meta["val"].squeeze(1)}
    return memo[half]


def _of_pairs(graph: fx.Graph, values: fx.Node, interleaved: bool, memo: dict[fx.Node, fx.Node]) -> fx.Node:
    """Repeat a computation on one member of each pair, for values that pairs share (see `_is_shared`)."""
    source = values.args[0]
    if is_call(values, aten.repeat_interleave.self_int):
        assert isinstance(source, fx.Node)
        return source
    if (halves := concat_operands(values)) is not None:
        return halves[0]  # type: ignore[no-any-return]
    if values not in memo:
        assert isinstance(source, fx.Node)
        before = _of_pairs(graph, source, interleaved, memo)
        with graph.inserting_before(values.next):
            memo[values] = graph.call_function(values.target, (before, *values.args[1:]), values.kwargs)  # type: ignore[arg-type]
        size = shape(values)[-1]
        stop, step = (size, 2) if interleaved else (size // 2, 1)
        memo[values].meta = {**values.meta, "val": values.meta["val"][..., :stop:step]}
    return memo[values]


def _in_rows(graph: fx.Graph, half: fx.Node, x: fx.Node, memo: dict[fx.Node, fx.Node]) -> fx.Node:
    """Expand a table to as many rows as `x`, if it has one row for all."""
    source = _row_source(graph, half, x)
    assert source is not None  # checked for the table already
    if source is half:
        return half
    if half not in memo:
        with graph.inserting_before(half.next):
            size = graph.call_function(aten.sym_size.int, (source, 0))
            memo[half] = graph.call_function(aten.expand.default, (half, [size, -1, -1]))
        size.meta = {"val": shape(x)[0]}
        memo[half].meta = {**half.meta, "val": half.meta["val"].expand(shape(x)[0], -1, -1)}
    return memo[half]


def _row_source(graph: fx.Graph, table: fx.Node, x: fx.Node) -> fx.Node | None:
    """Return a node with as many rows as `x`: the table itself or an input; None if there is none."""
    table_rows, rows = expression(shape(table)[0]), expression(shape(x)[0])
    if table_rows != 1 or rows == 1:
        return table
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    return next((node for node in inputs if shape(node) and expression(shape(node)[0]) == rows), None)


def _with_rest(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the node to replace and the rotated input: for a partial rotation, the whole head."""
    first, users = last_axis_slice(x), list(node.users)
    if first is None or first[1] != 0 or first[3] != 1 or len(users) != 1:
        return node, x
    pieces = concat_operands(users[0])
    if pieces is None or len(pieces) != 2 or pieces[0] is not node:
        return node, x
    head, size = first[0], shape(first[0])[-1]
    return (users[0], head) if last_axis_slice(pieces[1]) == (head, first[2], size, 1) else (node, x)


class RotaryTables:
    """Tables of cosines and sines, and the table row of each position of each batch row, for any `position_ids`."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._memo: dict[tuple[Any, ...], ir.Value] = {}

    def table(self, values: ir.Value) -> ir.Value:
        """Return the table `[batch * length, half]` of `[batch, length, half]`."""
        return self._once(values, lambda build: build("Reshape", values, [-1, static_dim(values, 2)]))

    def rows(self, values: ir.Value) -> ir.Value:
        """Return `[batch, length]`, the index of each position's row in the table of `[batch, length, half]`."""

        def rows(build: Builder) -> ir.Value:
            sizes = build("Shape", values, start=0, end=2)
            count = build("ReduceProd", sizes, keepdims=0)
            return build("Reshape", build("Range", 0, count, 1), sizes)

        return self._once(values, rows, "rows")

    def table_after_rest(self, values: ir.Value, rest: float, count: int) -> ir.Value:
        """Return the table of `[batch, length, half]` after `count` rows filled with one number."""
        dtype = values.dtype or ir.DataType.FLOAT
        fill = np.full((count, static_dim(values, 2) or 0), rest)
        table = self.table(values)
        return self._once(
            values, lambda build: build("Concat", build.tensor(fill, dtype), table, axis=0), rest, count, after=table
        )

    def rows_of_heads(self, values: ir.Value, num_rotated: int, num_kept: int) -> ir.Value:
        """Return `[batch * length, num_rotated + num_kept]`, the table row of each head; 0 if it is not rotated.

        The table begins with as many extra rows as there are heads, the fewest that the runtime accepts.
        """
        table = self.table_after_rest(values, 1.0, num_rotated + num_kept)

        def heads(build: Builder) -> ir.Value:
            end = build("Squeeze", build("Shape", table, start=0, end=1))
            rows = build("Unsqueeze", build("Range", num_rotated + num_kept, end, 1), [1])
            return build("Mul", rows, [*[1] * num_rotated, *[0] * num_kept])

        return self._once(values, heads, num_rotated, num_kept, after=table)

    def flat_shape(self, values: ir.Value, width: int) -> ir.Value:
        """Return the shape `[batch, length, width]` as a value."""

        def sizes(build: Builder) -> ir.Value:
            return build("Concat", build("Shape", values, start=0, end=2), [width], axis=0)

        return self._once(values, sizes, "shape", width)

    def _once(
        self, values: ir.Value, make: Callable[[Builder], ir.Value], *key: Any, after: ir.Value | None = None
    ) -> ir.Value:
        if (values, *key) not in self._memo:
            build = Builder(self._graph)
            self._memo[values, *key] = make(build)
            build.insert_after(after or values)
        return self._memo[values, *key]


@contract(needs={ROTARY_NODES}, ends={ROTARY_NODES})
@dataclass(frozen=True)
class LowerRotary:
    """Replace rotary operators by `com.microsoft.RotaryEmbedding`."""

    tables: RotaryTables  # the tables of the graph

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Replace them, in place."""
        count = 0
        for node, rotary in RotaryNode.all_in(model.graph):
            if node.outputs[0].uses():
                build = Builder(model.graph)
                replace_value(rotated(build, rotary, rotary.x, self.tables), node.outputs[0])
                build.insert_before(node)
            model.graph.remove(node, safe=True)
            count += 1
        return PassResult(count)


def rotated(build: Builder, rotary: RotaryNode, x: ir.Value, tables: RotaryTables) -> ir.Value:
    """Build the runtime's operator; `x` may also be merged, `[batch, length, heads * size]`."""
    heads, size, half = static_dim(rotary.x, 1), static_dim(rotary.x, 3), static_dim(rotary.cos, 2)
    attributes: dict[str, int] = {"interleaved": rotary.interleaved}
    if size is None or half is None or size != 2 * half:
        attributes |= {"rotary_embedding_dim": 2 * int(half or 0), "num_heads": int(heads or 0)}
    inputs = (x, tables.rows(rotary.cos), tables.table(rotary.cos), tables.table(rotary.sin))
    result = build("RotaryEmbedding", *inputs, domain=MICROSOFT, **attributes)
    result.shape, result.type = x.shape, x.type
    return result
