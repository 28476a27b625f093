"""The caches of rows in buffers that are as long as the longest row may be, and take memory as rows fill them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gralora_fx.format.cache_slots import past_slots
from gralora_fx.run.sessions.ort_values import TORCH_DTYPES, as_value
from gralora_fx.run.sessions.paged_memory import PAGE, PagedBytes, whole_pages

_LEAST, _SHARE = 4, 16  # pages that a part takes at a time: so many at least, or this share of those that it has
_AHEAD = 64  # pages that it takes at a time of a text that is known


@dataclass(frozen=True)
class _Parts:
    """Equal parts of a row's cache, each of which begins a page: a head's keys in a layer, its values, or a state.

    Attributes:
        count: How many there are.
        width: Bytes of a position; of a state, which has none, all of its bytes.
        grows: Whether it has positions.
    """

    count: int
    width: int
    grows: bool


class RowLayout:
    """The parts of a row's cache, and how much memory they take.

    Attributes:
        length: How many positions a row has room for, which fill whole pages in every part; None for no limit.
    """

    def __init__(self, inputs: Iterable[Any], part: str = "decoder", length: int | None = None) -> None:
        """Take the inputs of a session."""
        counts: Counter[tuple[int, bool]] = Counter()
        for slot, value in past_slots(inputs).items():
            if slot.part not in ("", part):
                continue
            shape, grows = slot.kind.shape(value.shape, 1, 1), slot.kind.grows
            count = 1 if grows is None else math.prod(shape[1:grows])
            size = math.prod(shape) * TORCH_DTYPES[value.type].itemsize
            counts[size // count, grows is not None] += count
        self._parts = [_Parts(count, *kind) for kind, count in counts.items()]
        # so many positions, and multiples of it, fill whole pages in every part
        self._step = max((PAGE // math.gcd(PAGE, each.width) for each in self._parts if each.grows), default=1)
        self.length = None if length is None else -(-length // self._step) * self._step

    def extent(self, positions: int) -> int:
        """Return for how many positions a row takes memory: up to a sixteenth more than it needs, or a few pages.

        Pages that are taken together lie together in memory, where the processor finds them sooner.
        """
        pages = -(-positions // self._step)
        run = max(1 << (pages // _SHARE).bit_length() >> 1, _LEAST)
        return self._within(-(-pages // run) * run)

    def ahead(self, positions: int, known: int) -> int:
        """Return for how many positions a row takes memory that reads a text."""
        return self._within(min(-(-known // self._step), -(-positions // self._step) + _AHEAD))

    def _within(self, pages: int) -> int:
        return pages * self._step if self.length is None else min(pages * self._step, self.length)

    def row_size(self, positions: int) -> int:
        """Return how many bytes a row takes."""
        count = self.extent(positions)
        return sum(each.count * whole_pages(each.width * (count if each.grows else 1)) for each in self._parts)


class CacheBuffers:
    """The caches of rows, each tensor of all rows in one buffer.

    In a buffer every head of every row has its own part, which is whole pages. So a row takes the memory that it
    writes, rounded up to pages for each head, and gives all of it back when it ends.

    Attributes:
        rows: How many rows there are.
        values: The buffers by the names of the inputs: keys and values `[rows, heads, length, size]`, and states.
        layout: The parts of a row.
    """

    def __init__(self, session: Any, rows: int, length: int) -> None:
        """Make the buffers, on the CPU."""
        inputs = session.get_inputs()
        self.layout = RowLayout(inputs, length=length)
        assert self.layout.length is not None
        self.rows = rows
        self._length, self._taken, self._known = self.layout.length, [0] * rows, [0] * rows
        self._memory: list[tuple[PagedBytes, int]] = []  # and how many parts with positions a row has in it
        values: dict[str, Any] = {}
        for slot, value in past_slots(inputs).items():
            shape, dtype = slot.kind.shape(value.shape, rows, self._length), TORCH_DTYPES[value.type]
            count = math.prod(shape)
            memory = PagedBytes(count * dtype.itemsize)
            tensor = torch.from_numpy(memory.array).view(dtype).reshape(shape)
            values[value.name] = as_value(tensor, value.type)
            grows = slot.kind.grows
            self._memory.append((memory, 0 if grows is None else math.prod(shape[1:grows])))
        self.values: Mapping[str, Any] = values

    def expect(self, row: int, positions: int) -> None:
        """Take note of how many positions a row will need soon, such as those of its prompt."""
        self._known[row] = positions

    def take(self, row: int, positions: int) -> None:
        """Take the memory of what a row writes next."""
        before = self._taken[row]
        if positions <= before:
            return
        is_known = positions <= self._known[row]
        taken = self.layout.ahead(positions, self._known[row]) if is_known else self.layout.extent(positions)
        self._taken[row] = taken
        for memory, parts in self._memory:
            for part in range(row * parts, (row + 1) * parts):
                size = memory.array.nbytes // (self.rows * parts)
                width = size // self._length
                memory.take(part * size + before * width, part * size + taken * width)

    def give_back(self, row: int) -> None:
        """Give back what a row has taken, except pages that its states share with those of other rows."""
        self._taken[row] = self._known[row] = 0
        for memory, _ in self._memory:
            size = memory.array.nbytes // self.rows
            memory.give_back(row * size, (row + 1) * size)
