"""Checks of user-supplied paths, and the JSON files of a model's directory."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gralora_fx.base.sources import ADAPTER_FILE
from gralora_fx.errors import GraloraError, an, first_line, shown

_LONGEST = 300  # characters of a path in a message


def usable_path(
    value: object, error: type[GraloraError], *, remedy: str = "give another path", writes: bool = False
) -> Path:
    """Return a path that the file system accepts, whether or not it exists."""
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
    """Return a path to a directory that can be listed, or to nothing; see `usable_path`."""
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
    """Return a path to a file or to nothing; see `usable_path`."""
    path = usable_path(value, error, remedy=remedy, writes=writes)
    if path.is_dir():
        raise _refusal(value, error, os.strerror(errno.EISDIR), remedy, writes)
    if writes and any(parent.is_file() for parent in path.parents):
        raise _refusal(value, error, os.strerror(errno.ENOTDIR), remedy, writes)
    return path


def shown_path(value: object) -> str:
    """Format a user-supplied path for a message, quoted and truncated if it is long or unprintable."""
    if not isinstance(value, Path):
        return shown(value)
    text = str(value)
    return text if text.isprintable() and len(text) < _LONGEST else shown(text)


def _refusal(value: object, error: type[GraloraError], reason: str, remedy: str, writes: bool) -> GraloraError:
    name = shown_path(value)
    says = f"cannot write {name}" if writes else f"{name} is not a usable path"
    return error(f"{says} ({reason}); {remedy}")


def _look_up(path: Path) -> None:
    """Look up a path, then each missing part by itself, since a part may be too long."""
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


MODEL_FILE, EXPORT_FILE = "config.json", "gralora_export.json"
RECORD = "base_quantization"  # field with a base's quantization, in a model, an adapter and an export
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def is_model(path: Path) -> bool:
    """Return whether a directory is a saved model, not an export (which has a model's configuration too)."""
    return (path / MODEL_FILE).is_file() and not (path / EXPORT_FILE).is_file()


def described(directory: str | Path) -> str:
    """Describe what is at a path, to follow the path in a message: `is empty`, `is an adapter`."""
    from gralora_fx.base.sources.other_formats import gguf_file, pickle_file

    path = Path(directory)
    try:
        if not path.exists():
            return "is a broken link" if path.is_symlink() else "does not exist"
        if not path.is_dir():
            return "is a file"
        if (path / EXPORT_FILE).is_file():
            return "is an export"
        if (path / ADAPTER_FILE).is_file():
            return "is an adapter"
        if is_model(path):
            return "is a model"
        if any(path.glob("*.onnx")):
            return f"holds an ONNX model of another program, without {EXPORT_FILE}"
        if (weights := gguf_file(path) or pickle_file(path)) is not None:
            return f"holds {weights}, without {MODEL_FILE}"
        return "holds something else" if any(path.iterdir()) else "is empty"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def read_json(path: Path, error: type[GraloraError]) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:  # a UnicodeDecodeError is a ValueError too
        raise error(f"{path} cannot be read as JSON ({failure}); it may be truncated, so copy it again") from failure


def read_json_object(path: Path, error: type[GraloraError]) -> dict[str, Any]:
    """Read a JSON file that holds an object; see `read_json`."""
    content = read_json(path, error)
    if not isinstance(content, dict):
        raise error(f"{path} holds {'null' if content is None else an(type(content).__name__)}, not a JSON object")
    return content


def local_directory(name: str | Path, error: type[GraloraError]) -> Path | None:
    """Return the directory of a name, or None for a hub id."""
    path = usable_path(name, error, remedy="give a local directory or a hub id")
    if path.is_dir():
        return path
    if path.exists():
        raise error(f"{path} is not a directory; give the directory that holds it")
    return None


def check_json_objects(directory: Path, names: Sequence[str], error: type[GraloraError]) -> None:
    """Check that the existing ones of the files hold a JSON object."""
    for file in names:
        if (directory / file).is_file():
            read_json_object(directory / file, error)
