"""The rows of a decoder by the memory of their caches, which may be bounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from gralora_fx.run.engine.cache_memory import CacheMemory, NoRoomError, RowMemory

Source = Mapping[str, NDArray[Any]]


class BoundedRows(ABC):
    """Rows whose caches take memory as they read.

    Attributes:
        memory: The memory of all caches.
    """

    memory: CacheMemory

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many tokens a row has room for."""

    @abstractmethod
    def length(self, row: int) -> int:
        """How many tokens a row has read."""

    def check_room(self, max_length: int, adapter: str | None = None, source: Source | None = None) -> None:
        """Check that a row has room where no other is open.

        Args:
            max_length: The most tokens that it reads.
            adapter: As of `Decoder.open`.
            source: As of `Decoder.open`.

        Raises:
            NeverRoomError: Its caches may take more than the bound.
        """
        if self.memory.limit is not None:
            self.memory.check(self._row_memory(max_length, source), self._copies_size(adapter, alone=True))

    def has_room(self, max_length: int | None = None, adapter: str | None = None, source: Source | None = None) -> bool:
        """Return whether one more row has room now, so that it and all others can go on to their ends.

        Args:
            max_length: The most tokens that it reads; None for the capacity.
            adapter: As of `Decoder.open`.
            source: As of `Decoder.open`.
        """
        if self.memory.limit is None:
            return True
        return self.memory.admits(self._row_memory(max_length, source), self._copies_size(adapter))

    def reserve(self, row: int, count: int) -> bool:
        """Take the memory of tokens that a row reads next; return whether there is room now.

        Args:
            row: Its number, as `Decoder.open` gave it.
            count: How many tokens.
        """
        return self.memory.reserve(row, self._row_size(self.length(row), count))

    def room(self, rows: int, source: Source | None = None) -> int:
        """Return how many tokens each of some rows may read within the bound; 0 if there is no room for so many rows.

        Args:
            rows: How many rows are open at a time.
            source: As of `Decoder.open`.
        """
        limit, lengths = self.memory.limit, range(1, self.capacity + 1)
        if limit is None:
            return self.capacity
        return bisect_right(lengths, limit, key=lambda length: rows * self.row_size(length, source))

    def row_size(self, length: int, source: Source | None = None) -> int:
        """Return how many bytes the caches of a row may take.

        Args:
            length: How many tokens it reads.
            source: As of `Decoder.open`.
        """
        return self._row_memory(length, source).claim

    def trim(self) -> None:  # noqa: B027  # most have nothing to free
        """Free, while no row is open, what a row would need no more than a moment to make again."""

    def _expect(self, row: int, tokens: int) -> None:  # noqa: B027  # it matters to buffers alone
        """Take note of how many tokens a row will have read soon, for which there is room."""

    def _take_room(self, row: int, max_length: int | None, source: Source | None) -> None:
        """Take the memory of a row that is opened."""
        self.memory.open(row, self._row_memory(max_length, source), self._copies_size())

    def _reserve_all(self, read: Mapping[int, NDArray[Any]]) -> None:
        """Take the memory of what rows read."""
        resting = [row for row, array in read.items() if not self.reserve(row, len(array))]
        if resting:
            raise NoRoomError(
                f"max_memory has no room for what row {resting[0]} would read now; close another row first, or give "
                "more memory"
            )
        self.memory.shrink_shared()

    def _row_memory(self, max_length: int | None, source: Source | None) -> RowMemory:
        fixed = self._source_size(source)
        longest = self.capacity if max_length is None else min(max_length, self.capacity)
        return RowMemory(fixed + self._row_size(0, 0), fixed + self._row_size(longest, 0), fixed)

    @abstractmethod
    def _row_size(self, tokens: int, count: int) -> int:
        """Return how many bytes the caches of a row take, without those of its source."""

    def _source_size(self, source: Source | None) -> int:
        """Return how many bytes the caches of a row's source take."""
        return 0

    def _copies_size(self, adapter: str | None = None, *, alone: bool = False) -> int:
        """Return how many bytes the copies of the adapters of open rows take, and of one more."""
        return 0
