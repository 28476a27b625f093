"""Writing an export directory whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gralora_fx.errors import ExportError

MANIFEST_NAME = "gralora_export.json"


def check_output(directory: str | Path) -> Path:
    """The output path, if it may be written: new, empty, or an earlier export.

    Raises:
        ExportError: It is a file, or a directory that holds something else.
    """
    path = Path(directory)
    try:
        path.exists()
        is_current = path.resolve() == Path.cwd()
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{str(directory)[:80]!r} is no usable path ({error}); give another output directory"
        ) from error
    if is_current:
        raise ExportError("the output is the current directory, which cannot be replaced; give another one")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ExportError(f"{path} is not a directory; give another output directory")
    if path.is_dir() and any(path.iterdir()) and not _is_export(path):
        raise ExportError(
            f"{path} is not empty and holds no {MANIFEST_NAME}, so it is no earlier export; "
            "give another output directory or empty this one"
        )
    return path


def _is_export(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "schema_version" in manifest


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """A directory to write into, which takes the output's place when the block ends without an error.

    An earlier export there is replaced whole; after an error it is as it was, and nothing else is left.

    Args:
        directory: The output directory.

    Raises:
        ExportError: The output may not be written, or the disk refuses.
    """
    path = check_output(directory).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write beside {path} ({error.strerror}); give another output directory") from error
    try:
        yield stage
        stage.chmod(0o755)  # mkdtemp makes it private
        _replace(stage, path)
    except OSError as error:
        raise ExportError(f"cannot write {path} ({error.strerror or error}); nothing was changed there") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(stage: Path, path: Path) -> None:
    if not path.exists():
        stage.rename(path)
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as trash:
        old = Path(trash) / "old"
        path.rename(old)
        try:
            stage.rename(path)
        except OSError:
            old.rename(path)
            raise
