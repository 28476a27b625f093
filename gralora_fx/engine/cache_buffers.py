"""The caches of rows in buffers that are as long as the longest row may be, and take memory as rows fill them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gralora_fx.runtime.ort_values import TORCH_DTYPES, as_value
from gralora_fx.runtime.paged_memory import PAGE, PagedBytes, whole_pages
from gralora_fx.tracing.inputs.cache_slots import past_slots

_LEAST, _RUNS = 4, 16  # pages that a part of a row's cache takes together, and how many times it does so at least
_AHEAD = 64  # pages that it takes together of a text that is known


@dataclass(frozen=True)
class _Parts:
    """Parts of a row's cache of one kind, each of which begins a page.

    Attributes:
        count: How many there are: a head has one in each layer's keys, and one in its values.
        width: Bytes of a position in one; of a state all of its bytes.
        grows: Whether it has positions.
    """

    count: int
    width: int
    grows: bool


class CacheSlots:
    """How much memory the cache of a row takes.

    Attributes:
        length: How many positions a row has room for, which are whole pages in every part; None for no limit.
    """

    def __init__(self, inputs: Iterable[Any], part: str = "decoder", length: int | None = None) -> None:
        """Take the inputs of a session.

        Args:
            inputs: The inputs.
            part: Of an encoder-decoder's cache, `"decoder"` or `"encoder"`.
            length: How many positions a row has room for, at least; None for no limit.
        """
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
        """For how many positions a row takes memory that needs some: for up to a sixteenth more, or a few pages.

        The more pages are taken together, the more of them lie together, where the processor finds them sooner.
        """
        pages = -(-positions // self._step)
        run = max(1 << (pages // _RUNS).bit_length() >> 1, _LEAST)
        return self._within(-(-pages // run) * run)

    def ahead(self, positions: int, known: int) -> int:
        """For how many positions a row takes memory that needs some, and is known to need others soon."""
        return self._within(min(-(-known // self._step), -(-positions // self._step) + _AHEAD))

    def _within(self, pages: int) -> int:
        return pages * self._step if self.length is None else min(pages * self._step, self.length)

    def row_size(self, positions: int) -> int:
        """How many bytes a row takes that needs some positions."""
        count = self.extent(positions)
        return sum(each.count * whole_pages(each.width * (count if each.grows else 1)) for each in self._parts)


class CacheBuffers:
    """Buffers of rows.

    A row has a place in each, at which every head has one of its own. These places are whole pages, so a row takes what
    it has written, rounded up to a page for each head; and gives all of it back when it ends.

    Attributes:
        rows: How many rows there are.
        values: The buffers by the names of the inputs: keys and values `[rows, heads, length, size]`, and states.
        slots: What they are of.
    """

    def __init__(self, session: Any, rows: int, length: int) -> None:
        """Make the buffers, on the CPU.

        Args:
            session: The session that reads and writes them.
            rows: How many rows there are.
            length: How many positions a row has room for, at least.

        Raises:
            OSError: There are no addresses for so many.
        """
        inputs = session.get_inputs()
        self.slots = CacheSlots(inputs, length=length)
        assert self.slots.length is not None
        self.rows = rows
        self._length, self._taken, self._known = self.slots.length, [0] * rows, [0] * rows
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
        """Take note of how many positions a row is known to need, such as those of its prompt."""
        self._known[row] = positions

    def take(self, row: int, positions: int) -> None:
        """Take memory for what a row writes next.

        Args:
            row: Its number.
            positions: How many it needs, with those that it has.
        """
        before = self._taken[row]
        if positions <= before:
            return
        is_known = positions <= self._known[row]
        self._taken[row] = self.slots.ahead(positions, self._known[row]) if is_known else self.slots.extent(positions)
        for memory, parts in self._memory:
            for part in range(row * parts, (row + 1) * parts):
                size = memory.array.nbytes // (self.rows * parts)
                width = size // self._length
                memory.take(part * size + before * width, part * size + self._taken[row] * width)

    def give_back(self, row: int) -> None:
        """Give back what a row has taken; a part of a page that a state shares with that of another row stays."""
        self._taken[row] = self._known[row] = 0
        for memory, _ in self._memory:
            size = memory.array.nbytes // self.rows
            memory.give_back(row * size, (row + 1) * size)
