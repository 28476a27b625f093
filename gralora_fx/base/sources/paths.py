"""A path that a user gave, checked: that the file system takes it, and that it is what is meant; and one written to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from gralora_fx.errors import GraloraError, first_line, shown

_LONGEST = 300  # characters of a path in a message


def usable_path(
    value: object, error: type[GraloraError], *, remedy: str = "give another path", writes: bool = False
) -> Path:
    """A path that the file system takes, whether or not something is there."""
    try:
        path = Path(value)  # type: ignore[arg-type]
        if value and str(value).strip():
            _look_up(path)
            return path
        reason = "it is empty"
    except (TypeError, ValueError, OSError) as failure:
        holds_zero = isinstance(failure, ValueError) and "\0" in str(value)  # Pythons differ in how they say it
        reason = "it holds a zero byte" if holds_zero else first_line(failure)
        if isinstance(failure, OSError):
            reason = failure.strerror or reason
    raise _refusal(value, error, reason, remedy, writes)


def usable_directory(
    value: object, error: type[GraloraError], *, remedy: str = "give a directory", writes: bool = False
) -> Path:
    """A path at which there is a directory that can be listed, or nothing; otherwise as `usable_path`."""
    path = usable_path(value, error, remedy=remedy, writes=writes)
    try:
        if path.exists():
            os.scandir(path).close()
    except NotADirectoryError as failure:
        raise _refusal(value, error, "it is a file, not a directory", remedy, writes) from failure
    except OSError as failure:
        raise _refusal(value, error, failure.strerror or first_line(failure), remedy, writes) from failure
    return path


def usable_file(
    value: object, error: type[GraloraError], *, remedy: str = "give the path of a file", writes: bool = False
) -> Path:
    """A path that the file system takes, at which there is a file or nothing; otherwise as `usable_path`."""
    path = usable_path(value, error, remedy=remedy, writes=writes)
    if path.is_dir():
        raise _refusal(value, error, os.strerror(errno.EISDIR), remedy, writes)
    if writes and any(parent.is_file() for parent in path.parents):
        raise _refusal(value, error, os.strerror(errno.ENOTDIR), remedy, writes)
    return path


def shown_path(value: object) -> str:
    """What was given as a path, for a message: quoted and truncated where it is long or does not print."""
    if not isinstance(value, Path):
        return shown(value)
    text = str(value)
    return text if text.isprintable() and len(text) < _LONGEST else shown(text)


def _refusal(value: object, error: type[GraloraError], reason: str, remedy: str, writes: bool) -> GraloraError:
    name = shown_path(value)
    says = f"cannot write {name}" if writes else f"{name} is not a usable path"
    return error(f"{says} ({reason}); {remedy}")


def _look_up(path: Path) -> None:
    """Ask the file system for a path, each part that is not there yet by itself, since it may be too long."""
    there = path.absolute()
    missing = []
    while not _exists(there):
        missing.append(there.name)
        there = there.parent
    for name in missing:
        _exists(there / name)


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
