"""The tokens that count in a batch of rows padded on the right, and where each belongs.

The indices depend on the lengths of rows alone, which are inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from gralora_fx.errors import ExportError
from gralora_fx.exporters.rules.builder import Builder

NUM_TOKENS = "num_tokens"


class RowsError(ExportError):
    """Rows cannot be told apart in a model, so that they cannot have their own lengths or adapters."""


@dataclass(frozen=True)
class RowTokens:
    """Values of a graph that say which tokens count; those of one row follow each other."""

    sizes: Sequence[int | ir.SymbolicDim]  # batch and length, as the graph names them
    ids: ir.Value  # `[1, tokens]`, the tokens
    positions: ir.Value  # `[1, tokens]`, the position of each in its row
    tokens: ir.Value  # `[1, tokens]`, the index of each among all `batch * length`
    token_at: ir.Value  # `[batch, length]`, the token at each position; any at positions that do not count
    query: ir.Value  # `[batch]` int32, how many tokens of each row count
    # `[batch]` int32, how many tokens of each row attention reads: those that count, and padding after them where
    # another kernel is wanted
    attended: ir.Value
    cached: ir.Value  # `[batch]` int32, the index of the last position that attention writes
    total: ir.Value  # `[1]` int32, the most positions that a row has cached afterwards

    def to_rows(self, build: Builder, value: ir.Value) -> ir.Value:
        """Scatter `[1, tokens, width]` to `[batch, length, width]`."""
        return take_tokens(build, value, self.token_at, self.sizes)

    def of_rows(self, build: Builder, value: ir.Value) -> ir.Value:
        """Gather `[1, tokens, width]` from `[batch, length, width]`."""
        return flat_tokens(build, value, self.tokens)

    def of_input(self, build: Builder, value: ir.Value, axis: int) -> ir.Value:
        """Gather `[..., 1, tokens, ...]` from an input `[..., batch, length, ...]`."""
        assert value.shape is not None
        sizes = list(value.shape)
        new: Any = [*sizes[:axis], -1, *sizes[axis + 2 :]]
        if not all(isinstance(size, int) for size in new):
            new = build("Concat", build.ints(*sizes[:axis], -1), build("Shape", value, start=axis + 2), axis=0)
        flat = build("Reshape", value, new)
        taken = build("Gather", flat, self.tokens, axis=axis)
        taken.type = value.type
        taken.shape = ir.Shape([*sizes[:axis], 1, ir.SymbolicDim(NUM_TOKENS), *sizes[axis + 2 :]])
        return taken

    def is_read(self, build: Builder) -> ir.Value:
        """Return `[batch, length, 1]`, whether a token counts at each position: `arange(length) < query[:, None]`."""
        length = build.size(self.token_at, 1)
        places = build("Range", 0, length, 1)
        counts = build("Unsqueeze", build("Cast", self.query, to=ir.DataType.INT64), [1])
        return build("Unsqueeze", build("Less", places, counts), [2])


def take_tokens(build: Builder, value: ir.Value, index: ir.Value, sizes: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    """Gather tokens of `[1, tokens, width]` or `[tokens, width]` to `[*sizes, width]`."""
    flat = value if value.shape is not None and len(value.shape) == 2 else build("Flatten", value, axis=2)
    taken = build("Gather", flat, index, axis=0)
    taken.type = value.type
    if value.shape is not None:
        taken.shape = ir.Shape([*sizes, value.shape[-1]])
    return taken


def flat_tokens(build: Builder, value: ir.Value, index: ir.Value) -> ir.Value:
    """Gather tokens of `[.., .., width]` to `[1, tokens, width]`."""
    return build("Gather", build("Flatten", value, axis=2), index, axis=0)


def row_tokens(
    build: Builder, input_ids: ir.Value, query: ir.Value, past: ir.Value, attended: ir.Value | None = None
) -> RowTokens:
    """Compute which tokens count in rows padded on the right, and where each belongs.

        counts = arange(length) < query[:, None]   tokens = flatnonzero(counts)
        ids = input_ids.flat[tokens]               positions = (past[:, None] + arange(length)).flat[tokens]
        token_at = max(cumsum(counts.flat) - 1, 0) cached = max(past + attended - 1, 0)
        total = max(max(cached) + 1, length)

    `input_ids` are `[batch, length]`. Of each row, `[batch]` int32, `query` tokens count, `past` were read before, and
    attention reads `attended`; None for those that count.
    """
    attended = query if attended is None else attended
    lengths = RowLengths(build, input_ids, query)
    order = build("Sub", build("CumSum", build("Cast", lengths.flat, to=ir.DataType.INT64), lengths.zero), lengths.one)
    token_at = build("Reshape", build("Max", order, lengths.zero), build("Shape", input_ids))
    before = build("Unsqueeze", build("Cast", past, to=ir.DataType.INT64), [1])
    ids, positions = (
        build("Gather", build("Reshape", value, [-1]), lengths.tokens)
        for value in (input_ids, build("Add", before, lengths.column))
    )
    for value in (ids, positions):
        value.shape, value.type = ir.Shape([1, ir.SymbolicDim(NUM_TOKENS)]), ir.TensorType(ir.DataType.INT64)
    zero, one = (build.tensor(number, ir.DataType.INT32) for number in (0, 1))
    cached = build("Max", build("Sub", build("Add", past, attended), one), zero)  # 0 for a row that has read nothing
    most = build("Add", build("ReduceMax", cached, keepdims=1), one)
    total = build("Max", most, build("Cast", build("Shape", input_ids, start=1, end=2), to=ir.DataType.INT32))
    assert input_ids.shape is not None
    return RowTokens(tuple(input_ids.shape), ids, positions, lengths.tokens, token_at, query, attended, cached, total)


def longest_row(build: Builder, tokens: RowTokens) -> RowTokens:
    """Trim the batch to its longest row.

    longest = max(query, 1)                                     token_at = token_at[:, :longest]
    tokens = tokens - tokens // length * (length - longest)
    """
    one = build.scalar(1)
    length = build("Max", build("ReduceMax", build("Cast", tokens.query, to=ir.DataType.INT64), keepdims=0), one)
    before = build.size(tokens.token_at, 1)
    end = build("Unsqueeze", length, [0])
    token_at = build("Slice", tokens.token_at, [0], end, [1])
    row = build("Div", tokens.tokens, before)
    index = build("Sub", tokens.tokens, build("Mul", row, build("Sub", before, length)))
    sizes = (tokens.sizes[0], ir.SymbolicDim("longest_row"))
    return replace(tokens, sizes=sizes, token_at=token_at, tokens=index)


def last_tokens(build: Builder, query: ir.Value) -> ir.Value:
    """Return `[batch, 1]`, the index of each row's last token, `max(cumsum(query) - 1, 0)`; any for an idle row."""
    ends = build("CumSum", build("Cast", query, to=ir.DataType.INT64), 0)
    last = build("Max", build("Sub", ends, 1), 0)
    return build("Unsqueeze", last, [1])


class RowLengths:
    """Values that follow from the lengths of rows."""

    def __init__(self, build: Builder, input_ids: ir.Value, query: ir.Value) -> None:
        """Compute them from the ids `[batch, length]` and the lengths `[batch]`."""
        self.zero, self.one = build.scalar(0), build.scalar(1)
        self.counts = build("Cast", query, to=ir.DataType.INT64)  # `[batch]` int64, how many tokens of each row count
        self.length = build.size(input_ids, 1)  # the length of the batch
        self.column = build("Range", self.zero, self.length, self.one)  # `[length]`, the positions in a row
        is_valid = build("Less", self.column, build("Unsqueeze", self.counts, [1]))
        self.flat = build("Reshape", is_valid, [-1])  # `[batch * length]`, which count
        self.tokens = build("NonZero", self.flat)  # `[1, tokens]`, their indices
