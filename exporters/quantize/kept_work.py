"""Results of an export that take long, kept beside the output while it runs: a killed export goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from gralora_fx.errors import ExportError, GraloraError, first_line, remedy, warn_caller
from gralora_fx.exporters.quantize.block_arrays import BlockArrays

_LOCK, _MADE_FROM = "lock", "made_from"
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class KeptWork:
    """Results by name, a file each in a directory; checksums tell damaged ones."""

    directory: Path | None = None  # None keeps results in memory
    _in_memory: dict[str, Arrays] = field(default_factory=dict, compare=False, repr=False)

    def read(self, name: str) -> Arrays | None:
        """Return a result, or None if it is not there; a damaged one is removed, with a warning."""
        if self.directory is None:
            return self._in_memory.get(name)
        if not (file := self._file(name)).is_file():
            return None
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            file.unlink()
            warn_caller(f"{name}, which an earlier run kept in {file}, is damaged ({error}), so it is computed again")
            return None

    def keep(self, name: str, arrays: Arrays) -> None:
        """Keep a result."""
        if self.directory is None:
            self._in_memory[name] = arrays
            return
        file = self._file(name)
        unfinished = file.with_suffix(".unfinished")
        try:
            with unfinished.open("wb") as opened:
                np.savez(opened, **arrays)  # type: ignore[arg-type]
            unfinished.rename(file)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise cannot_keep(self.directory, error) from error

    def _file(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


def cannot_keep(directory: Path, error: OSError) -> ExportError:
    """Return the error for a directory that cannot be written; what it holds stays there."""
    free = shutil.disk_usage(directory).free
    return ExportError(
        f"cannot write {directory} ({error.strerror or error}; {free:,} bytes are free); make room and export again, "
        "which goes on from what is there"
    )


@contextmanager
def memory_for(work: str) -> Iterator[None]:
    """Raise an error that names the work if memory runs out within the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            streamed = remedy("load the model with gralora_fx.loading.load_streamed", "give --stream")
            raise ExportError(
                f"there is not enough memory to {work} ({first_line(error)}); free some and export again, or {streamed}"
            ) from MemoryError(str(error))
        raise


@dataclass(frozen=True)
class KeptBlocks(Mapping[str, BlockArrays]):
    """Rounded weights, read from what is kept when they are needed."""

    work: KeptWork
    results: Mapping[str, str]  # name of each weight's result

    def __getitem__(self, name: str) -> BlockArrays:
        """Read a weight."""
        arrays = self.work.read(self.results[name])
        if arrays is None:
            raise ExportError(f"{name} was removed from {self.work.directory} during the export; export again")
        return blocks_of(arrays)

    def __iter__(self) -> Iterator[str]:
        """Yield the weights' names."""
        return iter(self.results)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.results)


def arrays_of(blocks: BlockArrays) -> Arrays:
    """Return blocks as a result to keep."""
    return {name: array for name, array in blocks._asdict().items() if array is not None}


def blocks_of(arrays: Arrays) -> BlockArrays:
    """Return the blocks of a result."""
    return BlockArrays(arrays["packed"], arrays["scales"], arrays.get("zero_points"))


@contextmanager
def work_beside(output: str | Path, made_from: Mapping[str, Any]) -> Iterator[KeptWork]:
    """Keep work beside an output while the block runs, and that of an earlier run if it was made from the same.

    It is removed after success, or an error that another run would repeat; after a kill or a full disk it stays.
    """
    path = Path(output).absolute()
    directory = path.with_name(f".{path.name}.gralora_work")
    text = json.dumps(made_from, sort_keys=True, default=str)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / _LOCK)
        lock.acquire(blocking=False)
    except Timeout:  # another export to the same output runs: this one keeps nothing
        with tempfile.TemporaryDirectory(prefix=f"{directory.name}-", dir=path.parent) as other:
            yield KeptWork(Path(other))
        return
    except OSError as error:
        raise cannot_keep(path.parent, error) from error
    stays = True
    try:
        known = directory / _MADE_FROM
        if not known.is_file() or known.read_text(encoding="utf-8") != text:
            for file in directory.iterdir():
                if file.name != _LOCK:
                    file.unlink()
            known.write_text(text, encoding="utf-8")
        yield KeptWork(directory)
        stays = False
    except GraloraError as error:
        stays = isinstance(error.__cause__, (OSError, MemoryError))
        raise
    finally:
        lock.release()
        if not stays:
            shutil.rmtree(directory, ignore_errors=True)
