"""Rotary position embedding as one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from torch import fx

from gralora_fx.exporters.fx_passes.matching import (
    ADD,
    MUL,
    aten,
    expression,
    is_call,
    joined,
    number,
    operands,
    part,
    same_size,
    shape,
)
from gralora_fx.exporters.onnx_passes.builder import MICROSOFT, Builder, known_size, take_place
from gralora_fx.exporters.pipeline import PassResult
from gralora_fx.exporters.translation.operators import RotaryNode
from gralora_fx.operators.constant_sizes import Reshape
from gralora_fx.operators.rotary import Rotary, Rotate


def mark_rotary(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Put rotary embeddings in terms of one operator.

    Before: `y = x * cos + cat(-x[..., half:], x[..., :half]) * sin`, or with neighbours in place of halves
    After:  `y = rotary(x, cos[..., :half], sin[..., :half])`

    Where only the first part of a head is turned and joined with the rest, that is one operator too.

    Args:
        graph: A traced graph in evaluation mode; it is changed in place.

    Returns:
        How many there were.
    """
    halves: dict[fx.Node, fx.Node] = {}
    wide: dict[fx.Node, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        found = _rotation(node)
        if found is None:
            continue
        x, *tables, interleaved = found
        if any(_row_source(graph, table.values, x) is None for table in tables):
            continue
        cos, sin = (_in_rows(graph, _half(graph, table, interleaved, halves), x, wide) for table in tables)
        place, x = _with_rest(node, x)
        with graph.inserting_before(place):
            turned = Rotary(x, cos, sin, interleaved).insert(graph)
        turned.meta = dict(place.meta)
        place.replace_all_uses_with(turned)
        count += 1
    graph.eliminate_dead_code()
    return PassResult(count)


def _rotation(node: fx.Node) -> tuple[fx.Node, _Table, _Table, bool] | None:
    """`(x, cos, sin, interleaved)` of a rotation; None of anything else."""
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
    """`(x, interleaved)` where a node is `x` with the members of each pair swapped and the first one negated."""
    halves = joined(node)
    if halves is not None and len(halves) == 2 and is_call(halves[0], aten.neg.default):
        second, first = part(halves[0].args[0]), part(halves[1])
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
    odd, even = part(second.args[0]), part(first)
    if odd is None or even is None or odd[0] is not even[0] or len(shape(node)) != len(shape(even[0])):
        return None
    size = shape(even[0])[-1]
    return (even[0], True) if even[1:] == (0, size, 2) and odd[1:] == (1, size, 2) else None


def _table(node: Any, x: fx.Node, interleaved: bool) -> _Table | None:
    """The table of a factor `[batch, 1, length, size]`, if the members of each pair share a value; else None."""
    sizes, wanted = shape(node), shape(x)
    if len(sizes) != 4 or expression(sizes[1]) != 1 or not all(same_size(sizes[i], wanted[i]) for i in (0, 2, 3)):
        return None
    unsqueezed = is_call(node, aten.unsqueeze.default) and node.args[1] in (1, -3)
    values = node.args[0] if unsqueezed else node
    return _Table(values, unsqueezed) if _is_shared(values, interleaved) else None


def _flat_table(values: Any, interleaved: bool) -> _Table | None:
    """The table of values `[batch, length, size]`, if the members of each pair share a value; else None."""
    return _Table(values, True) if len(shape(values)) == 3 and _is_shared(values, interleaved) else None


def _is_shared(values: Any, interleaved: bool) -> bool:
    """Whether the members of each pair share a value, whatever was computed of it."""
    source = values
    while is_call(source, aten.cos.default, aten.sin.default, aten._to_copy.default, *MUL):
        if is_call(source, *MUL) and number(source.args[1]) is None:
            return False
        source = source.args[0]
    if interleaved:
        return is_call(source, aten.repeat_interleave.self_int) and source.args[1:] == (2, -1)
    halves = joined(source)
    return halves is not None and len(halves) == 2 and halves[0] is halves[1]


class _Table(NamedTuple):
    """Values `[batch, length, size]`, or `[batch, 1, length, size]` where they are not flat."""

    values: fx.Node
    is_flat: bool


def _half(graph: fx.Graph, table: _Table, interleaved: bool, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """`[batch, length, half]`: the value that the members of each pair share, computed once."""
    half = _of_pairs(graph, table.values, interleaved, made)
    if table.is_flat:
        return half
    if half not in made:
        with graph.inserting_before(half.next):
            made[half] = graph.call_function(aten.squeeze.dim, (half, 1))
        made[half].meta = {**half.meta, "val": half.meta["val"].squeeze(1)}
    return made[half]


def _of_pairs(graph: fx.Graph, values: fx.Node, interleaved: bool, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """What was computed of values that the members of each pair share (see `_is_shared`), of one member each."""
    source = values.args[0]
    if is_call(values, aten.repeat_interleave.self_int):
        assert isinstance(source, fx.Node)
        return source
    if (halves := joined(values)) is not None:
        return halves[0]  # type: ignore[no-any-return]
    if values not in made:
        assert isinstance(source, fx.Node)
        before = _of_pairs(graph, source, interleaved, made)
        with graph.inserting_before(values.next):
            made[values] = graph.call_function(values.target, (before, *values.args[1:]), values.kwargs)  # type: ignore[arg-type]
        size = shape(values)[-1]
        stop, step = (size, 2) if interleaved else (size // 2, 1)
        made[values].meta = {**values.meta, "val": values.meta["val"][..., :stop:step]}
    return made[values]


def _in_rows(graph: fx.Graph, half: fx.Node, x: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """A table with as many rows as what is turned, of one that all rows share."""
    source = _row_source(graph, half, x)
    assert source is not None  # as for the table that the half is of
    if source is half:
        return half
    if half not in made:
        with graph.inserting_before(half.next):
            size = graph.call_function(aten.sym_size.int, (source, 0))
            made[half] = graph.call_function(aten.expand.default, (half, [size, -1, -1]))
        size.meta = {"val": shape(x)[0]}
        made[half].meta = {**half.meta, "val": half.meta["val"].expand(shape(x)[0], -1, -1)}
    return made[half]


def _row_source(graph: fx.Graph, table: fx.Node, x: fx.Node) -> fx.Node | None:
    """What has as many rows as `x` before a table is computed: the table, or an input; None where nothing has."""
    own, rows = expression(shape(table)[0]), expression(shape(x)[0])
    if own != 1 or rows == 1:
        return table
    inputs: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    return next((node for node in inputs if shape(node) and expression(shape(node)[0]) == rows), None)


def _with_rest(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The node to replace and what is turned: of a head that is turned in part and joined again, the whole head."""
    first, users = part(x), list(node.users)
    if first is None or first[1] != 0 or first[3] != 1 or len(users) != 1:
        return node, x
    pieces = joined(users[0])
    if pieces is None or len(pieces) != 2 or pieces[0] is not node:
        return node, x
    whole, size = first[0], shape(first[0])[-1]
    return (users[0], whole) if part(pieces[1]) == (whole, first[2], size, 1) else (node, x)


class RotaryTables:
    """Cosines and sines as the runtime's operators take them: rows of a table, and the row that each position has.

    Every position of every row of the batch has a row of its own, so whatever positions the model was given hold.
    """

    def __init__(self, graph: ir.Graph) -> None:
        """Start without tables.

        Args:
            graph: The graph that the tables are added to.
        """
        self._graph = graph
        self._made: dict[tuple[Any, ...], ir.Value] = {}

    def table(self, values: ir.Value) -> ir.Value:
        """`[batch * length, half]` of `[batch, length, half]`."""
        return self._once(values, lambda build: build("Reshape", values, build.ints(-1, known_size(values, 2))))

    def rows(self, values: ir.Value) -> ir.Value:
        """`[batch, length]`, the row of each position in the table of `[batch, length, half]`."""

        def rows(build: Builder) -> ir.Value:
            sizes = build("Shape", values, start=0, end=2)
            count = build("ReduceProd", sizes, keepdims=0)
            return build("Reshape", build("Range", build.scalar(0), count, build.scalar(1)), sizes)

        return self._once(values, rows, "rows")

    def table_after_rest(self, values: ir.Value, rest: float, count: int) -> ir.Value:
        """The table of `[batch, length, half]` behind `count` rows that hold one number."""
        dtype = values.dtype or ir.DataType.FLOAT
        fill = np.full((count, known_size(values, 2) or 0), rest)
        table = self.table(values)
        return self._once(
            values, lambda build: build("Concat", build.tensor(fill, dtype), table, axis=0), rest, count, after=table
        )

    def rows_of_heads(self, values: ir.Value, turned: int, kept: int) -> ir.Value:
        """`[batch * length, turned + kept]`, the row of each head: its position's, or the first.

        The table has as many rows in front as there are heads: the runtime takes no table with fewer rows than those.
        """
        table = self.table_after_rest(values, 1.0, turned + kept)

        def heads(build: Builder) -> ir.Value:
            end = build("Squeeze", build("Shape", table, start=0, end=1))
            rows = build("Unsqueeze", build("Range", build.scalar(turned + kept), end, build.scalar(1)), build.ints(1))
            return build("Mul", rows, build.ints(*[1] * turned, *[0] * kept))

        return self._once(values, heads, turned, kept, after=table)

    def flat_shape(self, values: ir.Value, width: int) -> ir.Value:
        """`[batch, length, width]` as a shape."""

        def sizes(build: Builder) -> ir.Value:
            return build("Concat", build("Shape", values, start=0, end=2), build.ints(width), axis=0)

        return self._once(values, sizes, "shape", width)

    def _once(
        self, values: ir.Value, make: Callable[[Builder], ir.Value], *key: Any, after: ir.Value | None = None
    ) -> ir.Value:
        if (values, *key) not in self._made:
            build = Builder(self._graph)
            self._made[values, *key] = make(build)
            build.insert_after(after or values)
        return self._made[values, *key]


@dataclass(frozen=True)
class LowerRotary:
    """Replace rotary operators by `com.microsoft.RotaryEmbedding`.

    Attributes:
        tables: The tables of the graph.
    """

    tables: RotaryTables

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Replace them, in place."""
        count = 0
        for node, rotary in RotaryNode.all_in(model.graph):
            if node.outputs[0].uses():
                build = Builder(model.graph)
                take_place(turned(build, rotary, rotary.x, self.tables), node.outputs[0])
                build.insert_before(node)
            model.graph.remove(node, safe=True)
            count += 1
        return PassResult(count)


def turned(build: Builder, rotary: RotaryNode, x: ir.Value, tables: RotaryTables) -> ir.Value:
    """The runtime's operator in place of a rotary operator.

    Args:
        build: Makes the node.
        rotary: The rotary operator.
        x: What is turned: its input, `[batch, heads, length, size]`, or that as `[batch, length, heads * size]`.
        tables: The tables of the graph.
    """
    heads, size, half = known_size(rotary.x, 1), known_size(rotary.x, 3), known_size(rotary.cos, 2)
    attributes = {"interleaved": rotary.interleaved}
    if size is None or half is None or size != 2 * half:
        attributes |= {"rotary_embedding_dim": 2 * int(half or 0), "num_heads": int(heads or 0)}
    inputs = (x, tables.rows(rotary.cos), tables.table(rotary.cos), tables.table(rotary.sin))
    result = build("RotaryEmbedding", *inputs, domain=MICROSOFT, **attributes)
    result.shape, result.type = x.shape, x.type
    return result
