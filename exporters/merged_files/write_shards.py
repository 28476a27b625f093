"""Writing of a merged model's safetensors files: what changes is computed, the rest is copied byte for byte."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gralora_fx.adapters.stored import StoredAdapter
from gralora_fx.errors import MergeError
from gralora_fx.exporters.merged_files.base_files import BaseFiles
from gralora_fx.exporters.merged_files.changes import Change, Changes
from gralora_fx.methods.fold import fold_rows, largest_change
from gralora_fx.sources.safetensors_layout import (
    FLOATS,
    Extent,
    Layout,
    bytes_of,
    element_rows,
    extremes_are_finite,
    header,
    read_into,
    read_tensor,
)

_WORKERS = 4  # also on fewer cores, since they wait for the disk too; each holds a block of values and a site's adapter
_BLOCK = 2**20  # values that are folded at a time
_COPIED = 2**26  # bytes that are copied at a time
_BUFFER = 2**22  # bytes of a buffer, where the system cannot copy between the files itself


class _Scratch(threading.local):
    """Memory that a thread uses again for every tensor: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        """Start with none."""
        self.kept: dict[np.dtype[Any], NDArray[Any]] = {}

    def matrix(self, rows: int, columns: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """A matrix without values, which the next one of its dtype overwrites."""
        flat = self.kept.get(dtype)
        if flat is None or flat.size < rows * columns:
            flat = self.kept[dtype] = np.empty(max(rows * columns, _BLOCK), dtype)
        return flat[: rows * columns].reshape(rows, columns)


@dataclass(frozen=True)
class NewShard:
    """A file to write.

    Attributes:
        old: The file that it takes the place of.
        head: What is before its first tensor.
        tensors: Where each tensor will lie, by key, in the order of the data.
    """

    old: Layout
    head: bytes
    tensors: Mapping[str, Extent]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return max([len(self.head), *(extent.end for extent in self.tensors.values())])


def new_shards(base: BaseFiles, changes: Changes) -> list[NewShard]:
    """The layout of every file of the result: that of the base's, with changed sizes and added tensors at the end."""
    return [_new_shard(shard, base, changes) for shard in base.shards]


def _new_shard(old: Layout, base: BaseFiles, changes: Changes) -> NewShard:
    added = {key: change for key, (change, near) in changes.added.items() if base.shard_of[near] is old}
    placed: dict[str, Extent] = {}
    end = 0
    for key, extent in sorted(old.tensors.items(), key=lambda entry: (entry[1].begin, entry[1].end)):
        change = changes.changed.get(key)
        dtype, shape = (extent.dtype, extent.shape) if change is None else (change.dtype, change.shape)
        size = extent.nbytes if shape == extent.shape else _size(dtype, shape)
        placed[key] = Extent(dtype, shape, end, end + size)
        end += size
    for key, change in added.items():
        placed[key] = Extent(change.dtype, change.shape, end, end + _size(change.dtype, change.shape))
        end = placed[key].end
    in_order = {key: placed[key] for key in [*old.tensors, *added]}
    head = header(in_order, old.metadata, 0)
    if not added and all(extent.shape == old.tensors[key].shape for key, extent in placed.items()):
        head = _first_bytes(old.file, old.data)  # byte for byte
    shift = len(head)
    moved = {key: Extent(e.dtype, e.shape, e.begin + shift, e.end + shift) for key, e in placed.items()}
    return NewShard(old, head, moved)


def _first_bytes(file: Path, count: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(count)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * FLOATS[dtype].itemsize


def write_shards(
    shards: list[NewShard],
    changes: Changes,
    adapter: StoredAdapter,
    handles: Mapping[str, int],
    base: BaseFiles,
    to: Path,
) -> None:
    """Write the files of the result, several tensors at a time.

    Args:
        shards: The files to write.
        changes: What changes.
        adapter: The adapter.
        handles: Descriptors of the base's files.
        base: The base's files.
        to: The directory to write into.

    Raises:
        MergeError: Merged values are not finite.
        OSError: Writing fails.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_WORKERS))
        futures: list[Future[None]] = []
        scratch = _Scratch()
        for shard in shards:
            file = stack.enter_context((to / shard.old.file.name).open("xb"))
            target = file.fileno()
            os.ftruncate(target, shard.nbytes)
            _write_all(target, memoryview(shard.head), 0)
            source = handles[shard.old.file.name]
            for key, change in _changed_in(shard, changes):
                made_from = None if change.source is None else base.shard_of[change.source]
                origin = -1 if made_from is None else handles[made_from.file.name]
                extent = None if change.source is None else base.extent(change.source)
                futures.append(
                    pool.submit(
                        _write_change, key, change, origin, extent, target, shard.tensors[key], adapter, scratch
                    )
                )
            for begin, end, place in _unchanged(shard, changes):
                futures += [
                    pool.submit(_copy, source, target, first, min(first + _COPIED, end) - first, place + first - begin)
                    for first in range(begin, end, _COPIED)
                ]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _changed_in(shard: NewShard, changes: Changes) -> Iterator[tuple[str, Change]]:
    for key in shard.tensors:
        if key in changes.changed and key in shard.old.tensors:
            yield key, changes.changed[key]
        elif key not in shard.old.tensors:
            yield key, changes.added[key][0]


def _unchanged(shard: NewShard, changes: Changes) -> Iterator[tuple[int, int, int]]:
    """Runs of bytes to copy: first and end in the old file, and the place of the first in the new one."""
    run: tuple[int, int, int] | None = None
    for key, new in shard.tensors.items():
        old = shard.old.tensors.get(key)
        if old is None or key in changes.changed or not old.nbytes:
            continue
        if run is not None and run[1] == old.begin and run[2] + run[1] - run[0] == new.begin:
            run = (run[0], old.end, run[2])
            continue
        if run is not None:
            yield run
        run = (old.begin, old.end, new.begin)
    if run is not None:
        yield run


def _write_change(
    key: str,
    change: Change,
    origin: int,
    extent: Extent | None,
    target: int,
    place: Extent,
    adapter: StoredAdapter,
    scratch: _Scratch,
) -> None:
    """Write one tensor of the result."""
    if change.values is not None:
        with np.errstate(over="ignore"):
            values = read_tensor(adapter.handle, change.values).astype(FLOATS[change.dtype])
        _check_finite(values, key)
        _write_all(target, bytes_of(values), place.begin)
    elif extent is None:
        raise AssertionError(f"{key} has neither values nor a source")
    elif change.site is None:
        _copy(origin, target, extent.begin, extent.nbytes, place.begin)
    else:
        _fold(key, change, origin, extent, target, place, adapter, scratch)


def _fold(
    key: str,
    change: Change,
    origin: int,
    extent: Extent,
    target: int,
    place: Extent,
    adapter: StoredAdapter,
    scratch: _Scratch,
) -> None:
    """Fold an update into a matrix, some rows at a time, accumulated in float32 or better and rounded once."""
    assert change.site is not None
    dtype = FLOATS[extent.dtype]
    accumulator = np.promote_types(dtype, np.float32)
    update = adapter.update(change.site)
    can_overflow = not largest_change(update) < _half_step(dtype)
    row = extent.nbytes // extent.shape[0]
    for first, end in element_rows(extent, _BLOCK):
        rows = scratch.matrix(end - first, extent.shape[1], dtype)
        sums = rows if dtype == accumulator else scratch.matrix(end - first, extent.shape[1], accumulator)
        read_into(origin, rows, extent.begin + first * row)
        if sums is not rows:
            sums[...] = rows
        fold_rows(sums, [update], first=first, shape=extent.shape, transposed=change.transposed, out=sums)
        if sums is not rows:
            with np.errstate(over="ignore"):
                rows[...] = sums
        if can_overflow:
            _check_finite(rows, key)
        _write_all(target, bytes_of(rows), place.begin + first * row)


def _half_step(dtype: np.dtype[Any]) -> float:
    """What can be added to the largest value of a dtype without reaching infinity: half of the last step before it."""
    limits = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(limits.max) * float(limits.eps) / 4


def _check_finite(values: NDArray[Any], key: str) -> None:
    if not extremes_are_finite(values):
        raise MergeError(
            f"{key} would hold values that are not finite in {values.dtype.name}; nothing was written. Merge into a "
            "copy of the base in float32"
        )


def _write_all(target: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count


def _copy(source: int, target: int, begin: int, count: int, place: int) -> None:
    """Copy bytes between files, by the system itself where it can."""
    copy: Callable[..., int] | None = getattr(os, "copy_file_range", None)
    while count and copy is not None:
        try:
            done = copy(source, target, count, begin, place)
        except OSError:  # other file systems, or a kernel that cannot
            break
        if not done:
            break
        begin, place, count = begin + done, place + done, count - done
    while count:
        data = os.pread(source, min(_BUFFER, count), begin)
        if not data:
            raise OSError("a file of the base has become shorter while it is read")
        _write_all(target, memoryview(data), place)
        begin, place, count = begin + len(data), place + len(data), count - len(data)
