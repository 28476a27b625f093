"""Sessions over the export of a streamed model: neither its weights nor theirs need be in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gralora_fx.exporters.artifact.staging import file_sizes
from gralora_fx.run.sessions.session import Runtime, mapped_options


def mapped_runtime(directory: Path, copied: int) -> Runtime | None:
    """Return how such sessions run; None for an export whose bytes they may copy, for faster products."""
    is_large = sum(file_sizes(directory).values()) > copied
    return Runtime(session_options=mapped_options()) if is_large else None


class ReopenedSession:
    """A session that is opened when it is used and closed in between, while the model takes the memory."""

    def __init__(self, opening: Callable[[], Any], opened: dict[Callable[[], Any], Any] | None = None) -> None:
        """Set the function that opens it, and the place of the open session, which others may share (see `in_turn`)."""
        self._opening = opening
        self._opened = {} if opened is None else opened

    def __getattr__(self, name: str) -> Any:
        """Return a method of the session."""
        if self._opening not in self._opened:
            self.close()
            self._opened[self._opening] = self._opening()
        return getattr(self._opened[self._opening], name)

    def close(self) -> None:
        """Free its memory, or that of the session in its place."""
        self._opened.clear()


def in_turn(*openings: Callable[[], Any]) -> list[ReopenedSession]:
    """Return sessions of which one is open at a time, since each maps the same weights again."""
    opened: dict[Callable[[], Any], Any] = {}
    return [ReopenedSession(opening, opened) for opening in openings]
