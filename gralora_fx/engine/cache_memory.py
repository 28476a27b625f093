"""The memory that the caches of a decoder take, within a bound in which every row that is open can go on to its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gralora_fx.config.byte_sizes import shown_size
from gralora_fx.engine.prefix_cache import PrefixCache
from gralora_fx.errors import ServingError


class NoRoomError(ServingError):
    """The caches of a row would take more memory than there is for them now."""


class NeverRoomError(NoRoomError):
    """The caches of a row would take more memory than there ever is for them."""


@dataclass(frozen=True)
class RowMemory:
    """What a row takes.

    Attributes:
        held: Bytes that it holds.
        most: Bytes that it may come to hold.
        source: How many of them are of what it was opened with.
    """

    held: int
    most: int
    source: int = 0


class CacheMemory:
    """What the caches of rows take, the copies of their adapters, and what rows share.

    A row takes memory as it grows, and says when it is opened how far that may be. Within a bound it may grow as long
    as all rows that are open could end one after the other, each with what is free then and what those before it have
    given back: the banker's algorithm (Dijkstra, EWD 108). So a row may rest until another ends, and never do all rest.
    What rows share gives way to them.

    Attributes:
        limit: The most bytes; None for no bound.
        shared: What rows share, if they do.
    """

    def __init__(self, limit: int | None) -> None:
        """Begin without rows."""
        self.limit = limit
        self.shared: PrefixCache | None = None
        self._rows: dict[int, RowMemory] = {}
        self._copies = 0

    @property
    def held(self) -> int:
        """How many bytes are taken."""
        return self.of_rows + (0 if self.shared is None else self.shared.size)

    @property
    def of_rows(self) -> int:
        """How many bytes are taken for rows and their adapters."""
        return self._copies + sum(row.held for row in list(self._rows.values()))

    def check(self, row: RowMemory, copies: int) -> None:
        """Check that there is ever room for a row.

        Args:
            row: What it takes.
            copies: What its adapter takes.

        Raises:
            NeverRoomError: There is not.
        """
        if self.limit is not None and row.most + copies > self.limit:
            raise NeverRoomError(
                f"the caches of the prompt and its answer may take {shown_size(row.most + copies)}, and max_memory has "
                f"room for {shown_size(self.limit)}; ask for fewer tokens, or give more memory"
            )

    def admits(self, row: RowMemory, copies: int) -> bool:
        """Return whether a row may be opened now.

        Args:
            row: What it takes.
            copies: What the adapters of all rows take then.
        """
        return self._is_safe([*self._rows.values(), row], copies)

    def open(self, number: int, row: RowMemory, copies: int) -> None:
        """Take note of a row that is opened, for which there is room.

        Args:
            number: Its number.
            row: What it takes.
            copies: What the adapters of all rows take now.
        """
        self._rows[number], self._copies = row, copies
        self._leave_rest()

    def close(self, number: int, copies: int) -> None:
        """Take note of a row that has given back what it held."""
        del self._rows[number]
        self._copies = copies
        self._leave_rest()

    def reserve(self, number: int, size: int) -> bool:
        """Let a row grow, if it may now; what it has set back it keeps until it ends.

        Args:
            number: Its number.
            size: How many bytes it is to hold, without those of what it was opened with.
        """
        row = self._rows[number]
        size += row.source
        if size <= row.held:
            return True
        grown = replace(row, held=size, most=max(size, row.most))
        others = (other for other in self._rows.values() if other is not row)
        if not self._is_safe([*others, grown], self._copies):
            return False
        self._rows[number] = grown
        self._leave_rest()
        return True

    def settle(self) -> None:
        """Let what rows share give back what they need."""
        if self.limit is not None and self.shared is not None:
            self.shared.shrink()

    def _leave_rest(self) -> None:
        """Leave to what rows share what they do not take."""
        if self.limit is not None and self.shared is not None:
            self.shared.room = min(self.shared.limit, max(self.limit - self.of_rows, 0))

    def _is_safe(self, rows: Iterable[RowMemory], copies: int) -> bool:
        """Return whether all of some rows can end."""
        if self.limit is None:
            return True
        by_rest = sorted(rows, key=lambda row: row.most - row.held)
        free = self.limit - copies - sum(row.held for row in by_rest)
        for row in by_rest:
            if free < max(row.most - row.held, 0):
                return False
            free += row.held
        return free >= 0
