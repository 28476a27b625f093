"""The tokens of rows in groups that share an adapter each, so that a row of a batch has its own."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gralora_fx.exporters.rules.builder import Builder
from gralora_fx.exporters.rules.rows.row_tokens import RowLengths, flat_tokens, take_tokens

TILE = 8  # most tokens of a row that share one copy of an adapter's tensors
_COPY = 3  # times that a copy of an adapter's tensors moves them through memory


@dataclass(frozen=True)
class TokenGroups:
    """Tokens in groups that share an adapter each."""

    # `[groups]`, the adapter of each; None where each adapter of the stack has one group, in its order
    ids: ir.Value | None
    tokens: ir.Value  # `[groups, size]`, the tokens of each; any after its last
    slots: ir.Value  # `[1, tokens]`, the index of each token among all `groups * size`

    def grouped(self, build: Builder, value: ir.Value) -> ir.Value:
        """Gather `[groups, size, width]` from `[1, tokens, width]` or `[tokens, width]`."""
        return take_tokens(build, value, self.tokens, (ir.SymbolicDim("num_groups"), ir.SymbolicDim("group_size")))

    def restored(self, build: Builder, value: ir.Value) -> ir.Value:
        """Gather `[1, tokens, width]` from `[groups, size, width]`."""
        return flat_tokens(build, value, self.slots)


def highest_id(build: Builder, query: ir.Value, ids: ir.Value) -> ir.Value:
    """Return `[1]`, the highest adapter id among the rows that read tokens, `max(ids * min(query, 1))`.

    `query`, the number of tokens of each row that count, and `ids` are `[batch]`.
    """
    reads = build("Min", build("Cast", query, to=ir.DataType.INT64), 1)
    return build("ReduceMax", build("Mul", ids, reads), keepdims=1)


def token_tiles(build: Builder, input_ids: ir.Value, query: ir.Value, ids: ir.Value) -> TokenGroups:
    """Group the tokens of rows padded on the right in tiles, each of tokens of one row.

    A tile has as many tokens as the longest row, at most `TILE`. If all rows that read tokens have one adapter, their
    tokens are one tile, whose adapter is copied once: then `counts` and `ids` below are those of all rows together, and
    `length` and `size` the number of tokens. `input_ids` are `[batch, length]`; `query`, which counts a row's tokens,
    and `ids` are `[batch]`.

        size = max(min(length, TILE), 2)                            offsets = arange(ceil(length / size)) * size
        row, tile = nonzero(offsets < counts[:, None])              starts = cumsum(counts) - counts
        tokens = (starts[row] + offsets[tile])[:, None] + arange(size), at most the last token
        begins = (cumsum(ceil(counts / size)) - ceil(counts / size)) * size
        slots = (begins[:, None] + arange(length)).flat[flatnonzero(arange(length) < counts[:, None])]
    """
    lengths = RowLengths(build, input_ids, query)
    zero, one = lengths.zero, lengths.one

    def as_column(value: ir.Value) -> ir.Value:
        return build("Unsqueeze", value, [1])

    reads = build("Greater", lengths.counts, zero)
    highest = highest_id(build, query, ids)
    is_same = build("Or", build("Equal", ids, highest), build("Not", reads))
    is_one = build("Equal", build("ReduceMin", build("Cast", is_same, to=ir.DataType.INT64), keepdims=0), one)
    total = build("ReduceSum", lengths.counts, keepdims=1)
    begin = build("Sub", build.ints(1), build("Unsqueeze", build("Cast", is_one, to=ir.DataType.INT64), [0]))
    end = build("Where", is_one, [1], [2**31])

    def either(whole: ir.Value, by_row: ir.Value) -> ir.Value:
        """Choose `[1]` for all rows together, or `[batch]`."""
        return build("Slice", build("Concat", whole, by_row, axis=0), begin, end)

    counts, ids = either(total, lengths.counts), either(highest, ids)
    number = build("Squeeze", total, [0])
    length = build("Where", is_one, number, lengths.length)
    size = _at_least_two(build, build("Where", is_one, number, build("Min", lengths.length, TILE)))

    def number_of(tokens: ir.Value) -> ir.Value:
        return build("Div", build("Add", tokens, build("Sub", size, one)), size)

    starts = build("Sub", build("CumSum", counts, zero), counts)
    offsets = build("Mul", build("Range", zero, number_of(length), one), size)  # [tiles of a row]
    used = build("NonZero", build("Less", offsets, as_column(counts)))  # [2, tiles]
    row, tile = (build("Gather", used, axis) for axis in (zero, one))
    first = build("Add", build("Gather", starts, row), build("Gather", offsets, tile))
    final = build("Sub", number, one)
    tokens = build("Min", build("Add", as_column(first), build("Range", zero, size, one)), final)
    numbers = number_of(counts)
    begins = build("Mul", build("Sub", build("CumSum", numbers, zero), numbers), size)  # [batch]
    slots = build("Reshape", build("Add", as_column(begins), build("Range", zero, length, one)), [-1])
    order = build("Where", is_one, build("Range", zero, number, one), lengths.tokens)
    return TokenGroups(build("Gather", ids, row), tokens, build("Gather", slots, order))


def ids_of_tokens(build: Builder, input_ids: ir.Value, query: ir.Value, ids: ir.Value) -> ir.Value:
    """Return the adapter of each token, `[1, tokens]`; for arguments see `token_tiles`."""
    lengths = RowLengths(build, input_ids, query)
    return build("Gather", ids, build("Div", lengths.tokens, lengths.length))


def tokens_of_adapters(
    build: Builder, input_ids: ir.Value, query: ir.Value, ids: ir.Value, adapters: ir.Value
) -> tuple[TokenGroups, ir.Value]:
    """Group the tokens of rows padded on the right by adapter, one group for each of the stack of `adapters`.

    No adapter is copied then, which is faster while the groups are short and few adapters are unused. The other
    arguments are those of `token_tiles`.

        own = ids[row of each token]                                hits = own[:, None] == arange(adapters)
        most = max(max(sum(hits, 0)), 2)                            before = sum(cumsum(hits, 0) * hits, 1) - 1
        slots = own * most + before                                 tokens.flat[slots] = arange(number of tokens)
    """
    lengths = RowLengths(build, input_ids, query)
    zero, one = lengths.zero, lengths.one
    indices = build("Squeeze", lengths.tokens, [0])
    number = build("Squeeze", build("Shape", indices), [0])
    own = build("Gather", ids, build("Div", indices, lengths.length))  # [tokens]
    column = build("Unsqueeze", own, [1])
    hits = build("Cast", build("Equal", column, build("Range", zero, adapters, one)), to=ir.DataType.INT64)
    counts = build("ReduceSum", hits, [0], keepdims=0)
    most = _at_least_two(build, build("ReduceMax", counts, keepdims=0))
    before = build("ReduceSum", build("Mul", build("CumSum", hits, zero), hits), [1], keepdims=0)
    slots = build("Add", build("Mul", own, most), build("Sub", before, one))
    shape = build("Concat", *(build("Unsqueeze", size, [0]) for size in (adapters, most)), axis=0)
    room = build("Mul", adapters, most)
    none = build("Expand", zero, build("Unsqueeze", room, [0]))
    tokens = build("Reshape", build("ScatterElements", none, slots, build("Range", zero, number, one)), shape)
    is_short = build("LessOrEqual", most, TILE)
    is_used = build("LessOrEqual", room, build("Add", build("Mul", number, _COPY), one))
    groups = TokenGroups(None, tokens, build("Unsqueeze", slots, [0]))
    return groups, build("And", is_short, is_used)


def _at_least_two(build: Builder, size: ir.Value) -> ir.Value:
    """Return the size of a group with room for at least two tokens, the second of which may be any.

    ONNX Runtime multiplies a lone token by an adapter in another order than several, which changes the last bits.
    """
    return build("Max", size, 2)
