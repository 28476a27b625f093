"""Atomic writing of an export directory: whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from gralora_fx.base.sources.model_files import shown_path, usable_directory, usable_file
from gralora_fx.errors import ExportError, command, marked, option, warn_caller
from gralora_fx.format.adapter_paths import own_adapters
from gralora_fx.format.export_directory import MANIFEST_NAME, is_export
from gralora_fx.format.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from gralora_fx.base.sources.same_base import BaseSource

_LOCK, _OLD = "lock", "old"  # names in a run's working folder, beside the output
_REMEDY = "give another output directory"
_REPLACING = f"{option(overwrite=True)} to replace it, or another output directory"
_LITTLE = 1 << 20  # bytes; with less free space, a write error without a reason is taken for a full disk


def check_output(directory: str | Path) -> Path:
    """Check the output path and return it; it must be new, empty or an earlier export."""
    path = check_path(directory)
    if path.is_dir() and any(path.iterdir()) and not is_export(path):
        raise ExportError(
            f"{path} is not empty and holds no {MANIFEST_NAME}, so it is not an earlier export; {_REMEDY} or empty "
            "this one"
        )
    return path


def check_converted(directory: str | Path, sources: Iterable[Path], marker: str, *, overwrite: bool) -> Path:
    """Check the output path of a result made from other directories; it must be new, empty or an earlier result."""
    path = check_path(directory)
    for source in sources:
        one, other = path.resolve(), source.resolve()
        if one == other or other in one.parents or one in other.parents:
            relation = "is" if one == other else "is within" if other in one.parents else "holds"
            raise ExportError(f"the output {path} {relation} the input {source}; give another output directory")
    if not (path.is_dir() and any(path.iterdir())):
        return path
    if not (path / marker).is_file():
        raise ExportError(
            f"{path} is not empty and holds no {marker}, so it is not an earlier result; give another output directory "
            "or empty this one"
        )
    if not overwrite:
        raise ExportError(f"{path} is not empty; give {_REPLACING}")
    return path


def check_path(directory: str | Path) -> Path:
    """Check the output path and return it; it must be a directory that can be made or replaced."""
    path = usable_directory(directory, ExportError, remedy=_REMEDY)
    if path.resolve() == Path.cwd():
        raise ExportError(f"the output is the current directory, which cannot be replaced; {_REMEDY}")
    if path.is_symlink():
        raise ExportError(f"{shown_path(path)} is a link, which cannot be replaced; {_REMEDY}")
    _check_writable(path.absolute().parent, (f"{_prefix(path)}{'x' * 8}",), path)
    return path


def check_folder(directory: str | Path) -> Path:
    """Check a directory to write files into and return it; it may exist and hold other files."""
    path = usable_directory(directory, ExportError, writes=True)
    _check_writable(path.absolute(), (), path)
    return path


def check_file(file: str | Path) -> Path:
    """Check a file to write and return it; it may exist."""
    path = usable_file(file, ExportError, writes=True)
    _check_writable(path.absolute().parent, (path.name,), path)
    return path


def _check_writable(folder: Path, names: Sequence[str], path: Path) -> None:
    """Check that a directory can be made or written to, by making one in its nearest existing parent."""
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), Path("/"))
    try:
        Path(tempfile.mkdtemp(prefix=".gralora-", dir=there)).rmdir()
    except OSError as error:
        raise ExportError(
            f"{shown_path(path)} cannot be made, since {there} is not writable; {_REMEDY} ({error.strerror})"
        ) from error
    limits = os.pathconf_names if hasattr(os, "pathconf") else {}
    longest, most = (
        os.pathconf(there, limit) if limit in limits else usual
        for limit, usual in (("PC_NAME_MAX", 255), ("PC_PATH_MAX", 4096))
    )
    parts = (*folder.relative_to(there).parts, *names)
    if any(len(os.fsencode(part)) > longest for part in parts) or len(os.fsencode(folder.joinpath(*names))) > most:
        raise ExportError(f"{shown_path(path)} cannot be made, since it or a name in it is too long; {_REMEDY}")


def check_replaced(directory: str | Path, *, task: str | None, fingerprint: str | None = None) -> None:
    """Refuse to replace an earlier export of another model."""
    earlier = _earlier(Path(directory))
    if earlier is None:
        return
    if earlier.task != task:
        raise _another(directory, f"for the task {earlier.task}, not {task}")
    if fingerprint is not None and earlier.base_fingerprint != fingerprint:
        raise _another(directory, "of another base")


def check_base_replaced(directory: str | Path, base: BaseSource) -> None:
    """Refuse to replace an earlier export of another base, if that is known before any weight is loaded."""
    earlier = _earlier(Path(directory))
    if earlier is None:
        return
    from gralora_fx.base.sources.same_base import compare_bases
    from gralora_fx.run.sessions.exported_base import base_of_export

    made = base_of_export(directory, earlier)
    compared = compare_bases(made, base)
    if compared.is_proven_different:
        named = f", {made.name}" if made.name else ""
        raise _another(directory, f"of another base{named}: {marked(compared.reason)}")


def warn_of_lost_adapters(directory: str | Path, brought: Iterable[str]) -> None:
    """Warn of adapters in an earlier export that the new one lacks, since an export is replaced as a whole."""
    path = Path(directory)
    if not is_export(path):
        return
    names = set(brought)
    if lost := [name for name in own_adapters(path, ExportError) if name not in names]:
        which = f"the adapter {lost[0]}" if len(lost) == 1 else f"the adapters {', '.join(lost)}"
        warn_caller(
            f"{directory} holds {which}, which this export removes; add them again with {command('export_adapter')}"
        )


def _earlier(path: Path) -> Manifest | None:
    """Return the manifest of an earlier export; None if there is none."""
    if not is_export(path):
        return None
    try:
        return read_manifest(path)
    except ExportError as error:
        raise _another(path, f"whose manifest is unreadable ({marked(error)})") from error


def _another(directory: str | Path, difference: str) -> ExportError:
    return ExportError(f"{directory} holds an export {difference}; give {_REPLACING}")


@contextmanager
def staged(directory: str | Path, check: Callable[[str | Path], Path] = check_output) -> Iterator[Path]:
    """Yield a directory to write into; it replaces the output when the block ends without an error.

    After an error an earlier export is unchanged. The next run removes the leftovers of a killed one.
    """
    path = check(directory).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        work = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write beside {path} ({error.strerror}); give another output directory") from error
    lock = FileLock(work / _LOCK)
    try:
        lock.acquire(blocking=False)
        stage = work / "new"
        stage.mkdir()
        yield stage
        _replace(stage, path, work / _OLD)
    except OSError as error:
        raise ExportError(f"cannot write {path} ({_reason(error, path.parent)}); nothing was changed there") from error
    finally:
        lock.release()
        shutil.rmtree(work, ignore_errors=True)


def require_space(directory: str | Path, needed: int) -> None:
    """Check that the disk has room; an earlier export's space does not count, since it is kept until the end."""
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed:
        raise ExportError(
            f"{directory} needs {needed:,} bytes, but its disk has {free:,} free; make room or give another output "
            "directory"
        )


def _reason(error: OSError, path: Path) -> str:
    """Return the operating system's reason, with the free space if the disk is full."""
    reason = error.strerror or str(error)
    free = shutil.disk_usage(path).free
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and free < _LITTLE)
    return f"{reason}; {free:,} bytes are free" if is_full else reason


def _prefix(path: Path) -> str:
    return f".{path.name}.gralora-"


def _clean_up(path: Path) -> None:
    """Remove leftovers of killed runs beside an output; restore an export that one of them was about to replace."""
    for work in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        lock = FileLock(work / _LOCK)
        try:
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # another run uses it, or has just ended
            continue
        try:
            if (work / _OLD).is_dir() and not path.exists():
                (work / _OLD).rename(path)
        finally:
            lock.release()
        shutil.rmtree(work, ignore_errors=True)


def _replace(stage: Path, path: Path, old: Path) -> None:
    if not path.exists():
        stage.rename(path)
        return
    path.rename(old)
    try:
        stage.rename(path)
    except OSError:
        old.rename(path)
        raise


def file_sizes(directory: str | Path) -> dict[str, int]:
    """Return the size in bytes of every file in a directory and its subdirectories, by POSIX path, sorted."""
    root = Path(directory)
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
