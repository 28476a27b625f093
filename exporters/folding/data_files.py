"""Data files copied with some of their bytes changed: from beginning to end, a few megabytes at a time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**22  # bytes
_ALIGNED = 4096  # bytes; where a new tensor begins, as ONNX Runtime maps files into memory


@dataclass(frozen=True)
class Change:
    """A tensor in a data file whose bytes become others.

    Attributes:
        offset: Where it begins, in bytes.
        length: Its bytes.
        row: Bytes of a row, of which as many as fit are changed at a time.
        rewrite: Changes some whole rows in place, given them as `[bytes]`, uint8, and the first one's number.
        target: Where the result begins; None for the same place, else the original stays as it is.
    """

    offset: int
    length: int
    row: int
    rewrite: Callable[[NDArray[np.uint8], int], None]
    target: int | None = None


def aligned(position: int) -> int:
    """The next place where a new tensor may begin."""
    return -(-position // _ALIGNED) * _ALIGNED


def copy_changed(source: Path, target: Path, changes: Sequence[Change]) -> str:
    """Copy a file with changes.

    Args:
        source: The file.
        target: The file to write.
        changes: What to change; tensors that stay in place do not overlap.

    Returns:
        The SHA-256 of the new file, computed by a thread that follows the writing.
    """
    in_place = sorted((change for change in changes if change.target is None), key=lambda change: change.offset)
    added = sorted((change for change in changes if change.target is not None), key=lambda change: change.target or 0)
    buffer = np.empty(max([_AT_ONCE, *(change.row for change in changes)]), np.uint8)
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        digest = _FollowingDigest(target)
        try:
            copier = _Copier(reader, writer, buffer, digest)
            for change in in_place:
                copier.copy(change.offset)
                copier.rewrite(change)
            copier.copy(source.stat().st_size)
            for change in added:
                copier.fill((change.target or 0) - copier.position)
                reader.seek(change.offset)
                copier.rewrite(change)
        finally:
            result = digest.finish()
    return result


class _Copier:
    """Copies from one open file to another, through one buffer."""

    def __init__(self, reader: Any, writer: Any, buffer: NDArray[np.uint8], digest: _FollowingDigest) -> None:
        self.reader, self.writer, self.buffer, self.digest = reader, writer, buffer, digest
        self.position = 0  # in the file that is written

    def copy(self, end: int) -> None:
        """Copy up to a position."""
        while self.position < end:
            self._write(self._read(min(end - self.position, len(self.buffer))))

    def rewrite(self, change: Change) -> None:
        """Write a changed tensor, read from where the reader is."""
        step = max(1, len(self.buffer) // max(1, change.row))
        rows = change.length // change.row if change.row else 0
        for row in range(0, rows, step):
            part = self._read(min(step, rows - row) * change.row)
            change.rewrite(part, row)
            self._write(part)

    def fill(self, count: int) -> None:
        """Write zeros."""
        self.buffer[:count] = 0
        self._write(self.buffer[:count])

    def _read(self, count: int) -> NDArray[np.uint8]:
        view, done = memoryview(self.buffer), 0  # type: ignore[arg-type]  # arrays are buffers
        while done < count:
            read = self.reader.readinto(view[done:count])
            if not read:
                raise OSError(f"{self.reader.name} has ended before its tensors do")
            done += read
        return self.buffer[:count]

    def _write(self, part: NDArray[np.uint8]) -> None:
        view = memoryview(part)  # type: ignore[arg-type]
        while view:
            view = view[self.writer.write(view) :]
        self.position += len(part)
        self.digest.advance(self.position)


class _FollowingDigest:
    """The SHA-256 of a file while it is written, by a thread that reads what is there already."""

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._is_done = path, 0, False
        self._changed = threading.Condition()
        self._digest = hashlib.sha256()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def advance(self, written: int) -> None:
        """Say how much is written."""
        with self._changed:
            self._written = written
            self._changed.notify()

    def finish(self) -> str:
        """The digest, once nothing more is written."""
        with self._changed:
            self._is_done = True
            self._changed.notify()
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        buffer, position = memoryview(bytearray(2**20)), 0
        with open(self._path, "rb", buffering=0) as file:
            while (written := self._wait_beyond(position)) > position:
                while position < written:
                    count = file.readinto(buffer[: min(len(buffer), written - position)])
                    self._digest.update(buffer[:count])
                    position += count

    def _wait_beyond(self, position: int) -> int:
        """How much is written, once that is more, or all."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_done or self._written > position)
            return self._written
