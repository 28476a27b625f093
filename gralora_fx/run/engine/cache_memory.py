"""The memory of a decoder's caches, optionally bounded, and its rows by the memory they take."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from gralora_fx.errors import ServingError

if TYPE_CHECKING:  # loaded where rows share what they read
    from gralora_fx.run.engine.prefix_cache import PrefixCache

Source = Mapping[str, NDArray[Any]]


class NoRoomError(ServingError):
    """A row's caches would take more memory than is free now."""


class NeverRoomError(NoRoomError):
    """A row's caches would take more memory than the bound, even without other rows."""


@dataclass(frozen=True)
class RowMemory:
    """The memory of a row's caches."""

    taken: int  # bytes that it has now
    claim: int  # bytes that it has at most, at its end
    source: int = 0  # bytes of both for the row's source, such as an encoder's


class CacheMemory:
    """The memory of rows' caches, of the copies of their adapters, and of the prefix cache that rows share.

    A row takes memory as it grows, and declares its maximum when it is opened. Within the limit a row may grow as long
    as all open rows could still end one after the other, each with the memory that is free by then: the banker's
    algorithm (Dijkstra, EWD 108). So a row may have to wait until another ends, but they never all wait. The shared
    prefix cache shrinks to make room for rows.

    Any thread may use it.

    Attributes:
        limit: The most bytes; None for no limit.
        shared: The cache that rows share; None if they share nothing.
    """

    def __init__(self, limit: int | None) -> None:
        """Start without rows; a limit of None means none."""
        self.limit = limit
        self.shared: PrefixCache | None = None
        self._rows: dict[int, RowMemory] = {}
        self._copies = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes taken in all."""
        return self.taken_by_rows + (0 if self.shared is None else self.shared.size)

    @property
    def taken_by_rows(self) -> int:
        """Bytes taken by rows and the copies of their adapters."""
        with self._lock:
            return self._sum()

    def check(self, row: RowMemory, copies: int) -> None:
        """Check that a row has room where no other is open."""
        size = row.claim + copies
        if self.limit is not None and size > self.limit:
            from gralora_fx.base.amounts import shown_size

            raise NeverRoomError(
                f"the caches of the prompt and its answer may take {shown_size(size)}, and max_memory has room for "
                f"{shown_size(self.limit)}; ask for fewer tokens, or give more memory"
            )

    def admits(self, row: RowMemory, copies: int) -> bool:
        """Return whether a row may be opened now."""
        with self._lock:
            return self._is_safe([*self._rows.values(), row], copies)

    def open(self, number: int, row: RowMemory, copies: int) -> None:
        """Add a row, which has room."""
        with self._lock:
            self._rows[number], self._copies = row, copies
            self._bound_shared()

    def close(self, number: int, copies: int) -> None:
        """Remove a row that has freed its memory."""
        with self._lock:
            del self._rows[number]
            self._copies = copies
            self._bound_shared()

    def reserve(self, number: int, size: int) -> bool:
        """Let a row grow if it may now, and return whether it may; it keeps the memory until it is closed."""
        with self._lock:
            row = self._rows[number]
            size += row.source
            if size <= row.taken:
                return True
            grown = replace(row, taken=size, claim=max(size, row.claim))
            if not self._is_safe([*(other for other in self._rows.values() if other is not row), grown], self._copies):
                return False
            self._rows[number] = grown
            self._bound_shared()
            return True

    def shrink_shared(self) -> None:
        """Shrink the shared cache to the memory that rows leave free."""
        if self.limit is not None and self.shared is not None:
            self.shared.shrink()

    def _sum(self) -> int:
        return self._copies + sum(row.taken for row in self._rows.values())

    def _bound_shared(self) -> None:
        if self.limit is not None and self.shared is not None:
            self.shared.room = min(self.shared.limit, max(self.limit - self._sum(), 0))

    def _is_safe(self, rows: Iterable[RowMemory], copies: int) -> bool:
        """Return whether all rows can end one after the other, those that need least first."""
        if self.limit is None:
            return True
        ordered = sorted(rows, key=lambda row: row.claim - row.taken)
        free = self.limit - copies - sum(row.taken for row in ordered)
        for row in ordered:
            if free < max(row.claim - row.taken, 0):
                return False
            free += row.taken
        return free >= 0


class BoundedRows(ABC):
    """Rows whose caches take memory as they read.

    Attributes:
        memory: The memory of all caches.
    """

    memory: CacheMemory

    @property
    @abstractmethod
    def capacity(self) -> int:
        """The number of tokens for which a row has room."""

    @abstractmethod
    def length(self, row: int) -> int:
        """Return how many tokens a row has read."""

    def check_room(self, max_length: int, adapter: str | None = None, source: Source | None = None) -> None:
        """Check that a row fits if no other is open.

        Raises:
            NeverRoomError: Its caches may take more than the limit.
        """
        if self.memory.limit is not None:
            self.memory.check(self._row_memory(max_length, source), self._copies_size(adapter, alone=True))

    def has_room(self, max_length: int | None = None, adapter: str | None = None, source: Source | None = None) -> bool:
        """Return whether one more row has room now, so that it and all others can continue to their ends.

        Args:
            max_length: The most tokens that it reads; None for the capacity.
            adapter: As in `Decoder.open`.
            source: As in `Decoder.open`.
        """
        if self.memory.limit is None:
            return True
        return self.memory.admits(self._row_memory(max_length, source), self._copies_size(adapter))

    def reserve(self, row: int, count: int) -> bool:
        """Take the memory of the tokens that a row reads next, if there is room now; return whether there is."""
        return self.memory.reserve(row, self._row_size(self.length(row), count))

    def room(self, rows: int, source: Source | None = None) -> int:
        """Return how many tokens each of so many rows may read within the limit; 0 if there is no room for them."""
        limit, lengths = self.memory.limit, range(1, self.capacity + 1)
        if limit is None:
            return self.capacity
        return bisect_right(lengths, limit, key=lambda length: rows * self.row_size(length, source))

    def row_size(self, length: int, source: Source | None = None) -> int:
        """Return the most bytes that a row's caches may take."""
        return self._row_memory(length, source).claim

    def trim(self) -> None:  # noqa: B027  # most have nothing to free
        """Free memory that is quick to fill again, while no row is open."""

    def _expect(self, row: int, tokens: int) -> None:  # noqa: B027  # it matters to buffers alone
        """Record how many tokens a row will soon have read, for which there is room."""

    def _take_room(self, row: int, max_length: int | None, source: Source | None) -> None:
        """Take the memory of a row when it is opened."""
        self.memory.open(row, self._row_memory(max_length, source), self._copies_size())

    def _reserve_all(self, read: Mapping[int, NDArray[Any]]) -> None:
        """Take the memory of the tokens that rows read."""
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
        """Return the bytes of a row's caches, without those of its source."""

    def _source_size(self, source: Source | None) -> int:
        """Return the bytes of the caches of a row's source."""
        return 0

    def _copies_size(self, adapter: str | None = None, *, alone: bool = False) -> int:
        """Return the bytes of copies of open rows' adapters, with one more adapter."""
        return 0
