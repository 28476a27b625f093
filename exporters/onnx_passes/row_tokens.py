"""The tokens that count in a batch of rows padded on the right, and where each belongs.

The indices depend on the lengths of rows alone, which are inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gralora_fx.errors import ExportError
from gralora_fx.exporters.onnx_passes.builder import Builder

NUM_TOKENS = "num_tokens"
TILE = 8  # most tokens of a row that share one copy of an adapter's tensors


class RowsError(ExportError):
    """Why rows cannot be told apart in a model, so that they have no lengths or adapters of their own."""


@dataclass(frozen=True)
class RowTokens:
    """Values of a graph that say which tokens count; those of one row follow each other.

    Attributes:
        sizes: Batch and length, as the graph names them.
        ids: `[1, tokens]`, the tokens.
        positions: `[1, tokens]`, the position of each in its row.
        tokens: `[1, tokens]`, the index of each among all `batch * length`.
        places: `[batch, length]`, the token at each position; any at positions that do not count.
        query: `[batch]` int32, how many tokens of each row count.
        cached: `[batch]` int32, the index of the last position that is cached afterwards.
        total: `[1]` int32, the most positions that a row has cached afterwards.
    """

    sizes: Sequence[int | ir.SymbolicDim]
    ids: ir.Value
    positions: ir.Value
    tokens: ir.Value
    places: ir.Value
    query: ir.Value
    cached: ir.Value
    total: ir.Value

    def to_rows(self, build: Builder, value: ir.Value) -> ir.Value:
        """`[batch, length, width]` of `[1, tokens, width]`."""
        return take_tokens(build, value, self.places, self.sizes)

    def of_rows(self, build: Builder, value: ir.Value) -> ir.Value:
        """`[1, tokens, width]` of `[batch, length, width]`."""
        return _flat_tokens(build, value, self.tokens)


@dataclass(frozen=True)
class RowTiles:
    """The same tokens in tiles, each some tokens of one row.

    Attributes:
        rows: `[tiles]`, the row of each.
        tokens: `[tiles, size]`, the tokens of each; any after the last of its row.
        places: `[1, tokens]`, the index of each token among all `tiles * size`.
    """

    rows: ir.Value
    tokens: ir.Value
    places: ir.Value

    def to_tiles(self, build: Builder, value: ir.Value) -> ir.Value:
        """`[tiles, size, width]` of `[1, tokens, width]` or `[tokens, width]`."""
        return take_tokens(build, value, self.tokens, (ir.SymbolicDim("num_tiles"), ir.SymbolicDim("tile_size")))

    def of_tiles(self, build: Builder, value: ir.Value) -> ir.Value:
        """`[1, tokens, width]` of `[tiles, size, width]`."""
        return _flat_tokens(build, value, self.places)


def take_tokens(build: Builder, value: ir.Value, index: ir.Value, sizes: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    """`[*sizes, width]` of the tokens at an index, of `[1, tokens, width]` or `[tokens, width]`."""
    flat = value if value.shape is not None and len(value.shape) == 2 else build("Flatten", value, axis=2)
    taken = build("Gather", flat, index, axis=0)
    taken.type = value.type
    if value.shape is not None:
        taken.shape = ir.Shape([*sizes, value.shape[-1]])
    return taken


def _flat_tokens(build: Builder, value: ir.Value, index: ir.Value) -> ir.Value:
    return build("Gather", build("Flatten", value, axis=2), index, axis=0)


def row_tokens(build: Builder, input_ids: ir.Value, query: ir.Value, past: ir.Value) -> RowTokens:
    """What tells tokens of rows that are padded on the right.

    Args:
        build: Makes the nodes.
        input_ids: `[batch, length]`.
        query: `[batch]` int32, how many tokens of each row count.
        past: `[batch]` int32, how many were read before.
    """
    lengths = _Lengths(build, input_ids, query)
    order = build("Sub", build("CumSum", build("Cast", lengths.flat, to=ir.DataType.INT64), lengths.zero), lengths.one)
    places = build("Reshape", build("Max", order, lengths.zero), build("Shape", input_ids))
    before = build("Unsqueeze", build("Cast", past, to=ir.DataType.INT64), build.ints(1))
    ids, positions = (
        build("Gather", build("Reshape", value, build.ints(-1)), lengths.tokens)
        for value in (input_ids, build("Add", before, lengths.column))
    )
    for value in (ids, positions):
        value.shape, value.type = ir.Shape([1, ir.SymbolicDim(NUM_TOKENS)]), ir.TensorType(ir.DataType.INT64)
    zero, one = (build.tensor(number, ir.DataType.INT32) for number in (0, 1))
    cached = build("Max", build("Sub", build("Add", past, query), one), zero)  # 0 for a row that has read nothing
    most = build("Add", build("ReduceMax", cached, keepdims=1), one)
    total = build("Max", most, build("Cast", build("Shape", input_ids, start=1, end=2), to=ir.DataType.INT32))
    assert input_ids.shape is not None
    return RowTokens(tuple(input_ids.shape), ids, positions, lengths.tokens, places, query, cached, total)


def last_tokens(build: Builder, query: ir.Value) -> ir.Value:
    """`[batch, 1]`: the last token of each row; any for an idle row.

    Args:
        build: Makes the nodes.
        query: `[batch]` int32, how many tokens of each row count.
    """
    ends = build("CumSum", build("Cast", query, to=ir.DataType.INT64), build.scalar(0))
    last = build("Max", build("Sub", ends, build.scalar(1)), build.scalar(0))
    return build("Unsqueeze", last, build.ints(1))


def row_tiles(build: Builder, input_ids: ir.Value, query: ir.Value) -> RowTiles:
    """The tiles of rows that are padded on the right: of as many tokens as the longest row has, at most `TILE`.

    Args:
        build: Makes the nodes.
        input_ids: `[batch, length]`.
        query: `[batch]` int32, how many tokens of each row count.
    """
    lengths = _Lengths(build, input_ids, query)
    zero, one = lengths.zero, lengths.one
    size = build("Min", lengths.length, build.scalar(TILE))

    def number_of(tokens: ir.Value) -> ir.Value:
        return build("Div", build("Add", tokens, build("Sub", size, one)), size)

    def as_column(value: ir.Value) -> ir.Value:
        return build("Unsqueeze", value, build.ints(1))

    starts = build("Sub", build("CumSum", lengths.counts, zero), lengths.counts)
    final = build("Sub", build("ReduceSum", lengths.counts, keepdims=0), one)
    offsets = build("Mul", build("Range", zero, number_of(lengths.length), one), size)  # [tiles of a row]
    used = build("NonZero", build("Less", offsets, as_column(lengths.counts)))  # [2, tiles]
    row, tile = (build("Gather", used, axis) for axis in (zero, one))
    first = build("Add", build("Gather", starts, row), build("Gather", offsets, tile))
    tokens = build("Min", build("Add", as_column(first), build("Range", zero, size, one)), final)
    numbers = number_of(lengths.counts)
    begins = build("Mul", build("Sub", build("CumSum", numbers, zero), numbers), size)  # [batch]
    places = build("Reshape", build("Add", as_column(begins), lengths.column), build.ints(-1))
    return RowTiles(row, tokens, build("Gather", places, lengths.tokens))


class _Lengths:
    """What the lengths of rows say.

    Attributes:
        counts: `[batch]` int64, how many tokens of each row count.
        length: The length of the batch.
        column: `[length]`, the positions in a row.
        flat: `[batch * length]`, which count.
        tokens: `[1, tokens]`, their indices.
    """

    def __init__(self, build: Builder, input_ids: ir.Value, query: ir.Value) -> None:
        self.zero, self.one = build.scalar(0), build.scalar(1)
        self.counts = build("Cast", query, to=ir.DataType.INT64)
        self.length = build("Squeeze", build("Shape", input_ids, start=1, end=2), build.ints(0))
        self.column = build("Range", self.zero, self.length, self.one)
        is_valid = build("Less", self.column, build("Unsqueeze", self.counts, build.ints(1)))
        self.flat = build("Reshape", is_valid, build.ints(-1))
        self.tokens = build("NonZero", self.flat)
