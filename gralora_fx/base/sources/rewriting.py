"""Rewriting of weight files with some tensors changed: used by folds into exports and into checkpoints.

A new file consists of parts: byte ranges copied from another file, and tensors whose rows an edit changes block by
block, so that no whole tensor is in memory unless its edit needs it. File formats supply the parts:
`safetensors_files`, and `fold/onnx_rewriting.py` of the exporters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**20  # values of a tensor that are changed at a time
COPIED = 2**26  # bytes that a thread copies at a time
_BUFFER = 2**22  # bytes of a buffer, where the system cannot copy between the files itself
_HASHED = 2**20  # bytes that are read back at a time for a digest

RowEdit = Callable[[NDArray[Any], int], None]  # changes stored rows in place, given them and the number of the first


class Edit(Protocol):
    """A change of a tensor's values.

    Attributes:
        takes_rows: Whether it can change some rows at a time, rather than all at once.
    """

    @property
    def takes_rows(self) -> bool: ...  # noqa: D102

    def prepare(self) -> RowEdit:
        """Read or compute prerequisites; called once per tensor, before its rows are changed in order."""
        ...


@dataclass(frozen=True)
class Kept:
    """The edit of a tensor that keeps its values, but is stored in another format."""

    takes_rows: bool = True

    def prepare(self) -> RowEdit:
        """Return an edit that changes nothing."""
        return lambda rows, first: None


@dataclass(frozen=True)
class StoredBytes:
    """A byte range of a file, read by its offset; nothing is memory-mapped."""

    file: Path
    begin: int  # offset of the first byte
    end: int  # offset after the last byte
    # the file's descriptor while it is kept open; None to open it for each read
    handle: int | None = field(default=None, kw_only=True)

    @property
    def is_whole(self) -> bool:
        """Return whether values are computed all at once, so that reading a part costs as much."""
        return False

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.end - self.begin

    def read_into(self, values: NDArray[Any], first: int = 0) -> None:
        """Fill a contiguous array with bytes, starting at byte `first`."""
        view, offset = bytes_of(values), self.begin + first
        with self.opened() as handle:
            while view:
                count = os.preadv(handle, [view], offset)
                if not count:
                    raise self.shortened()
                view, offset = view[count:], offset + count

    def shortened(self) -> CheckpointError:
        """Return the error for a file that has become too short."""
        return CheckpointError(f"{self.file} has become shorter while it is read; copy or save it again")

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield the file's descriptor: the open one, or a new one."""
        if self.handle is not None:
            yield self.handle
        else:
            with opened_for_reading(self.file) as handle:
                yield handle


@dataclass(frozen=True)
class Part:
    """A part of a new file: copied bytes, or a tensor changed by an edit."""

    begin: int  # offset in the new file
    nbytes: int  # its size in bytes
    source: StoredBytes | None  # the bytes that it is made from; None if the edit supplies all values
    edit: Edit | None = None  # changes the tensor's values; None to copy the bytes
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))  # dtype of the tensor
    columns: int = 1  # values in a stored row of the tensor

    @property
    def end(self) -> int:
        """Offset after its last byte in the new file."""
        return self.begin + self.nbytes


@dataclass(frozen=True)
class NewFile:
    """A file to write; bytes outside its parts are zero."""

    name: str
    parts: Sequence[Part]  # its parts, ordered by offset
    head: bytes = b""  # its first bytes

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return max([len(self.head), *(part.end for part in self.parts)])


def copies(parts: Iterable[Part]) -> list[Part]:
    """Sort copied parts by offset, merging those adjacent in both files."""
    joined: list[Part] = []
    for part in sorted((part for part in parts if part.nbytes), key=lambda part: part.begin):
        last = joined[-1] if joined else None
        assert part.source is not None
        if last is not None and last.source is not None and last.source.file == part.source.file:
            if last.end == part.begin and last.source.end == part.source.begin:
                whole = replace(last.source, end=part.source.end)
                joined[-1] = Part(last.begin, whole.nbytes, whole)
                continue
        joined.append(part)
    return joined


def write_files(files: Sequence[NewFile], directory: Path, *, workers: int, digests: bool = False) -> dict[str, str]:
    """Write files, several parts at a time."""
    found: dict[str, str] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        waiting: list[tuple[NewFile, int, list[tuple[int, Future[None]]]]] = []
        try:
            for file in files:
                target = stack.enter_context((directory / file.name).open("x+b", buffering=0)).fileno()
                os.ftruncate(target, file.nbytes)
                _write_all(target, memoryview(file.head), 0)
                tasks = [(part.begin, pool.submit(_write, part, target)) for part in _pieces(file.parts)]
                waiting.append((file, target, tasks))
            for file, target, tasks in waiting:
                digest, hashed = hashlib.sha256(), 0
                for begin, task in tasks:
                    if digests:
                        hashed = _hash_up_to(begin, digest, target, hashed)  # what is written before this part
                    task.result()
                if digests:
                    _hash_up_to(file.nbytes, digest, target, hashed)
                    found[file.name] = digest.hexdigest()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _pieces(parts: Iterable[Part]) -> Iterator[Part]:
    """Split long copies, so that each part is for one thread."""
    for part in parts:
        if part.edit is not None or part.source is None:
            yield part
            continue
        for first in range(0, part.nbytes, COPIED):
            begin = part.source.begin + first
            source = replace(part.source, begin=begin, end=min(begin + COPIED, part.source.end))
            yield Part(part.begin + first, source.nbytes, source)


def _write(part: Part, target: int) -> None:
    if part.edit is None:
        assert part.source is not None
        with part.source.opened() as handle:
            _copy(part.source, handle, target, part.begin)
        return
    change, width = part.edit.prepare(), part.columns * part.dtype.itemsize
    count = part.nbytes // width if width else 0
    is_whole = not part.edit.takes_rows or (part.source is not None and part.source.is_whole)
    step = max(1, count if is_whole else BLOCK // max(1, part.columns))
    block = np.empty((min(step, count), part.columns), part.dtype)  # one buffer for all, since fresh memory costs time
    for first in range(0, count, step):
        rows = block[: count - first]
        if part.source is not None:
            part.source.read_into(rows, first * width)
        change(rows, first)
        _write_all(target, bytes_of(rows), part.begin + first * width)


def _copy(source: StoredBytes, handle: int, target: int, place: int) -> None:
    """Copy bytes between files, in the kernel if possible."""
    begin, count = source.begin, source.nbytes
    copy: Callable[..., int] | None = getattr(os, "copy_file_range", None)
    while count and copy is not None:
        try:
            done = copy(handle, target, count, begin, place)
        except OSError:  # other file systems, or a kernel that cannot
            break
        if not done:
            break
        begin, place, count = begin + done, place + done, count - done
    while count:
        data = os.pread(handle, min(_BUFFER, count), begin)
        if not data:
            raise source.shortened()
        _write_all(target, memoryview(data), place)
        begin, place, count = begin + len(data), place + len(data), count - len(data)


def _write_all(target: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count


def _hash_up_to(end: int, digest: Any, target: int, position: int) -> int:
    """Update a digest with the bytes written up to an offset; return the offset."""
    while position < end:
        data = os.pread(target, min(_HASHED, end - position), position)
        if not data:
            raise OSError("a new file has become shorter while it is written")
        digest.update(data)
        position += len(data)
    return position


def as_tensor(values: NDArray[Any]) -> Tensor:
    """Return a tensor that shares an array's memory; bfloat16 arrays work too."""
    import torch

    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def bytes_of(values: NDArray[Any]) -> memoryview:
    """Return a contiguous array's bytes as a buffer; bfloat16 arrays work too."""
    return memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # arrays are buffers


@contextmanager
def opened_for_reading(file: Path) -> Iterator[int]:
    """Open a file for reading and yield its descriptor."""
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); copy or save it again") from error
    try:
        yield handle
    finally:
        os.close(handle)
