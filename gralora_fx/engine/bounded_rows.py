"""Rows whose caches take memory, maybe within a bound: what a decoder can say of it, and grant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from gralora_fx.engine.cache_memory import CacheMemory, NoRoomError, RowMemory

Source = Mapping[str, NDArray[Any]]


class BoundedRows(ABC):
    """The rows of a decoder, by the memory of their caches.

    Attributes:
        memory: What the caches take.
    """

    memory: CacheMemory

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many tokens a row has room for."""

    @abstractmethod
    def length(self, row: int) -> int:
        """How many tokens a row has read."""

    def check_room(self, most: int, adapter: str | None = None, source: Source | None = None) -> None:
        """Check that the caches of a row ever have room.

        Args:
            most: The most tokens that it reads.
            adapter: As of `open`.
            source: As of `open`.

        Raises:
            NeverRoomError: The bound of memory is below what they may take.
        """
        if self.memory.limit is not None:
            self.memory.check(self._row_memory(most, source), self._copies_size(adapter, alone=True))

    def has_room(self, most: int | None = None, adapter: str | None = None, source: Source | None = None) -> bool:
        """Return whether the caches of one more row have room now, so that it and the others can go on to their ends.

        Args:
            most: The most tokens that it reads; None for its capacity.
            adapter: As of `open`.
            source: As of `open`.
        """
        if self.memory.limit is None:
            return True
        return self.memory.admits(self._row_memory(most, source), self._copies_size(adapter))

    def reserve(self, row: int, count: int) -> bool:
        """Return whether a row may read so many tokens in the next step; if so, there is room for what they take.

        Args:
            row: Its number, as `open` gave it.
            count: How many tokens.
        """
        return self.memory.reserve(row, self._row_size(self.length(row), count))

    def longest(self, rows: int) -> int:
        """Return of how many tokens each of some rows may be that run together; 0 if there is no room for any.

        Args:
            rows: How many rows.
        """
        limit, lengths = self.memory.limit, range(1, self.capacity + 1)
        if limit is None:
            return self.capacity
        return bisect_right(lengths, limit, key=lambda tokens: rows * self.most_size(tokens))

    def most_size(self, most: int, source: Source | None = None) -> int:
        """Return how much memory the caches of a row may come to take.

        Args:
            most: The most tokens that it reads.
            source: As of `open`.
        """
        return self._row_memory(most, source).most

    def rest(self) -> None:  # noqa: B027  # most have nothing to let go
        """Let go of what the next row would need no more than a moment to make again; none reads for a while."""

    def _expect(self, row: int, tokens: int) -> None:  # noqa: B027  # it matters to buffers alone
        """Take note of how many tokens a row is to read at least."""

    def _take_room(self, row: int, most: int | None, source: Source | None) -> None:
        """Take the room of a row that is opened."""
        self.memory.open(row, self._row_memory(most, source), self._copies_size())

    def _reserve_all(self, read: Mapping[int, NDArray[Any]]) -> None:
        """Take the room of what rows read.

        Raises:
            NoRoomError: There is none now.
        """
        resting = [row for row, array in read.items() if not self.reserve(row, len(array))]
        if resting:
            raise NoRoomError(
                f"max_memory has no room for what row {resting[0]} would read now; close another row first, or give "
                "more memory"
            )
        self.memory.settle()

    def _row_memory(self, most: int | None, source: Source | None) -> RowMemory:
        fixed = self._source_size(source)
        longest = self.capacity if most is None else min(most, self.capacity)
        return RowMemory(fixed + self._row_size(0, 0), fixed + self._row_size(longest, 0), fixed)

    @abstractmethod
    def _row_size(self, tokens: int, count: int) -> int:
        """How much memory the caches of a row take when it reads some tokens, without those of its source.

        Args:
            tokens: How many it has read before.
            count: How many it reads.
        """

    def _source_size(self, source: Source | None) -> int:
        """How much memory the caches of what a row was opened with take."""
        return 0

    def _copies_size(self, adapter: str | None = None, *, alone: bool = False) -> int:
        """How much memory the copies of the adapters take that open rows have, and one more.

        Args:
            adapter: One more; None for none.
            alone: Whether to leave out those of the open rows.
        """
        return 0
