"""Atomic saving of several files: all of them or none, even if the process is killed or the disk is full.

A save has three steps, each of which leaves a readable directory:

1. The files are written to a folder inside the directory, and flushed to disk.
2. That folder is renamed to `.gralora-commit`. This commits the save: `current_file` finds the files there.
3. The files are moved to their places and the folder is removed; after a kill, the next save does so.

While several files are moved, the last of them is missing rather than from another save: a program that does not know
the folder (PEFT) finds no tensors, rather than tensors beside another configuration. Other files in the directory stay.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from gralora_fx.base.sources.model_files import usable_directory
from gralora_fx.errors import GraloraError

_COMMIT = ".gralora-commit"
_STAGE = ".gralora-stage-"
_PATIENCE = 300.0  # seconds to wait for another program that saves to the same directory
_READS, _PAUSE = 50, 0.02  # attempts to read files that change meanwhile, and seconds between attempts
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # from file systems that cannot lock a directory

T = TypeVar("T")
Writer = Callable[[Path], object]


def save_together(
    directory: str | Path, folders: Mapping[str, Mapping[str, Writer]], error: type[GraloraError]
) -> None:
    """Write files to a directory, all or none; finish or remove leftovers of a killed save."""
    if not folders:
        return
    path = usable_directory(directory, error, remedy="give another directory", writes=True).absolute()
    created: list[Path] = []
    happened = False
    try:
        _make_folder(path, created)
        if _of_one_owner(path.parent / _COMMIT, path):
            _settle(path.parent)
        for folder in filter(None, folders):
            _settle(path / folder)
        with _locked(path):
            _finish(path)
            _stage(path, folders, created)
            happened = True
            _finish(path)
    except (OSError, ValueError, TypeError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        if happened:
            raise error(
                f"{path} was saved, but its files could not be moved out of {path / _COMMIT} ({reason}); they are read "
                "there, and the next save moves them"
            ) from failure
        _remove_empty(created)
        raise error(f"cannot write {path} ({reason}); give another directory") from failure


def read_together(directory: Path, names: Sequence[str], read: Callable[..., T]) -> T:
    """Read files that belong together, retrying if another process saves them meanwhile."""
    for _ in range(_READS):
        before = [_version(current_file(directory, name)) for name in names]
        try:
            result = read(*(path for path, _ in before))
        except GraloraError:
            if before == [_version(current_file(directory, name)) for name in names]:
                raise
        else:
            if before == [_version(current_file(directory, name)) for name in names]:
                return result
        time.sleep(_PAUSE)
    return read(*(current_file(directory, name) for name in names))


def current_file(directory: Path, name: str) -> Path:
    """Return a file's path: its place, or the folder of a committed but unfinished save."""
    unfinished = [directory / _COMMIT]
    if _of_one_owner(directory.parent / _COMMIT, directory):
        unfinished.append(directory.parent / _COMMIT / directory.name)
    return next((folder / name for folder in unfinished if _version(folder / name)[1]), directory / name)


def _of_one_owner(folder: Path, directory: Path) -> bool:
    """Return whether both have the same owner; in a shared folder such as `/tmp` anybody could create the first."""
    try:
        return folder.stat().st_uid == directory.stat().st_uid
    except OSError:
        return False


def _version(path: Path) -> tuple[Path, tuple[int, ...] | None]:
    """Return a path, and a key that changes when the file is replaced."""
    try:
        status = path.stat()
    except OSError:
        return path, None
    return path, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def _make_folder(path: Path, created: list[Path]) -> None:
    """Create a directory and its parents; record which were missing."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        created.append(folder)


def _remove_empty(created: list[Path]) -> None:
    for folder in reversed(created):
        with contextlib.suppress(OSError):  # not empty: another program has written to it
            folder.rmdir()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory against other saves; the lock ends with the process.

    Where directories cannot be locked (Windows, some network drives), two simultaneous saves may mix their files; the
    sizes recorded with the tensors reveal that on loading.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another program has been saving there for {_PATIENCE:.0f} seconds") from None
                time.sleep(_PAUSE)
            except OSError as failure:
                if failure.errno in _NO_LOCKS:
                    break
                raise
        yield
    finally:
        os.close(handle)


def _settle(directory: Path) -> None:
    """Finish a killed save in another directory, which would hide the files saved now."""
    if (directory / _COMMIT).is_dir():
        with _locked(directory):
            _finish(directory)


def _stage(path: Path, folders: Mapping[str, Mapping[str, Writer]], created: list[Path]) -> None:
    """Write the files to a staging folder, and commit the save by one rename."""
    for left in path.glob(f"{_STAGE}*"):  # we hold the lock, so the save that created it was killed
        shutil.rmtree(left)
    for folder, files in folders.items():
        _make_folder(path / folder, created)
        if not (path / folder).is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path / folder} is not a directory")
        for target in (path / folder / name for name in files):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{target} is a directory")
    stage = path / f"{_STAGE}{secrets.token_hex(4)}"
    stage.mkdir()
    try:
        for folder, files in folders.items():
            (stage / folder).mkdir(exist_ok=True)
            for name, write in files.items():
                write(stage / folder / name)
                _flush(stage / folder / name)
            _flush(stage / folder)
        _flush(stage)
        stage.rename(path / _COMMIT)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _flush(path)


def _finish(path: Path) -> None:
    """Move a committed save's files to their places, including those of a killed save."""
    commit = path / _COMMIT
    if not commit.is_dir():
        return
    for folder in sorted({file.parent for file in commit.rglob("*") if file.is_file()}):
        target = path / folder.relative_to(commit)
        target.mkdir(exist_ok=True)
        *others, last = sorted(file.name for file in folder.iterdir() if file.is_file())
        if any(not _same(folder / name, target / name) for name in others):
            (target / last).unlink(missing_ok=True)
        for name in (*others, last):
            (folder / name).replace(target / name)
        _flush(target)
    shutil.rmtree(commit)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # directories cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
