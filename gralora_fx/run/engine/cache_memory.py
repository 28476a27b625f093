"""The memory of a decoder's caches, within a bound under which every open row can go on to its end."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gralora_fx.base.amounts import shown_size
from gralora_fx.errors import ServingError
from gralora_fx.run.engine.prefix_cache import PrefixCache


class NoRoomError(ServingError):
    """A row's caches would take more memory than is free now."""


class NeverRoomError(NoRoomError):
    """A row's caches would take more memory than the bound, even without other rows."""


@dataclass(frozen=True)
class RowMemory:
    """The memory of a row's caches.

    Attributes:
        taken: Bytes that it has now.
        claim: Bytes that it has at most, at its end.
        source: Bytes of both that are of what the row was opened with, such as the source of an encoder.
    """

    taken: int
    claim: int
    source: int = 0


class CacheMemory:
    """The memory of rows' caches, of the copies of their adapters, and of what rows share.

    A row takes memory as it grows, and states when it is opened how much it may come to take. Within a bound it may
    grow as long as all open rows could still end one after the other, each with the memory that is free by then: the
    banker's algorithm (Dijkstra, EWD 108). So a row may have to rest until another ends, but never do all rest. What
    rows share gives way to them.

    Any thread may use it.

    Attributes:
        limit: The most bytes; None for no bound.
        shared: What rows share; None if they share nothing.
    """

    def __init__(self, limit: int | None) -> None:
        """Begin without rows.

        Args:
            limit: The most bytes; None for no bound.
        """
        self.limit = limit
        self.shared: PrefixCache | None = None
        self._rows: dict[int, RowMemory] = {}
        self._copies = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """How many bytes are taken."""
        return self.taken_by_rows + (0 if self.shared is None else self.shared.size)

    @property
    def taken_by_rows(self) -> int:
        """How many bytes rows and the copies of their adapters take."""
        with self._lock:
            return self._sum()

    def check(self, row: RowMemory, copies: int) -> None:
        """Check that a row has room where no other is open."""
        size = row.claim + copies
        if self.limit is not None and size > self.limit:
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
        """Remove a row, which has given back what it took."""
        with self._lock:
            del self._rows[number]
            self._copies = copies
            self._bound_shared()

    def reserve(self, number: int, size: int) -> bool:
        """Let a row grow; return whether it may now. It keeps what it took until it is closed."""
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
        """Free of what rows share as much as they need."""
        if self.limit is not None and self.shared is not None:
            self.shared.shrink()

    def _sum(self) -> int:
        return self._copies + sum(row.taken for row in self._rows.values())

    def _bound_shared(self) -> None:
        if self.limit is not None and self.shared is not None:
            self.shared.room = min(self.shared.limit, max(self.limit - self._sum(), 0))

    def _is_safe(self, rows: Iterable[RowMemory], copies: int) -> bool:
        """Return whether rows can all end, those first that need least for it."""
        if self.limit is None:
            return True
        ordered = sorted(rows, key=lambda row: row.claim - row.taken)
        free = self.limit - copies - sum(row.taken for row in ordered)
        for row in ordered:
            if free < max(row.claim - row.taken, 0):
                return False
            free += row.taken
        return free >= 0
