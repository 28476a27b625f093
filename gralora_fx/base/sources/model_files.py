"""Paths that users give, checked, and the directory of a model by its name: what it holds beside weights."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gralora_fx.base.sources import ADAPTER_FILE
from gralora_fx.errors import GraloraError, first_line, option, shown

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


MODEL_FILE, EXPORT_FILE = "config.json", "gralora_export.json"
RECORD = "base_quantization"  # the field that says how a base was quantized: of a model, an adapter and an export
GENERATION_CONFIG = "generation_config.json"
_CONFIG_FILES = (MODEL_FILE, GENERATION_CONFIG)


def is_model(path: Path) -> bool:
    """Whether a directory holds a saved model, and is not an export, which holds the configuration of one."""
    return (path / MODEL_FILE).is_file() and not (path / EXPORT_FILE).is_file()


def described(directory: str | Path) -> str:
    """What is at a path, to go on from the path itself: `is empty`, `is an adapter`."""
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
    """Read a JSON file that holds an object; otherwise as `read_json`."""
    content = read_json(path, error)
    if not isinstance(content, dict):
        raise error(f"{path} holds {'null' if content is None else f'a {type(content).__name__}'}, not a JSON object")
    return content


def local_directory(name: str | Path, error: type[GraloraError]) -> Path | None:
    """The directory of a name, or None for a hub id."""
    path = usable_path(name, error, remedy="give a local directory or a hub id")
    if path.is_dir():
        return path
    if path.exists():
        raise error(f"{path} is not a directory; give the directory that holds it")
    return None


def check_model_files(name: str | Path, error: type[GraloraError], *, named_by: str | None = None) -> Path | None:
    """Check that a local directory is a saved model, before anything is loaded."""
    if named_by is not None:
        try:
            return check_model_files(name, error)
        except error as problem:
            reason = str(problem).partition("; give ")[0]
            raise error(
                f"{reason}; it is the base that {named_by} names, so give where it is as {option(model=...)}"
            ) from problem
    from gralora_fx.base.sources.base_quantization import packed_quantization
    from gralora_fx.base.sources.other_formats import gguf_file, of_gguf

    if str(name).endswith(".gguf") and Path(name).is_file():
        raise error(of_gguf(Path(name).parent, Path(name).name))
    directory = local_directory(name, error)
    if directory is None:
        if Path(name).is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
            raise error(
                f"no model can be loaded from {name} (there is no such directory); give a directory or a hub id"
            )
        return None
    if (file := gguf_file(directory)) is not None:
        raise error(of_gguf(directory, file))
    if not (directory / _CONFIG_FILES[0]).is_file():
        raise error(
            f"no {_CONFIG_FILES[0]} in {directory}, which {described(directory)}; give the directory of a saved model"
        )
    if (directory / EXPORT_FILE).is_file():
        raise error(f"{directory} is an export, not a model; give the directory of the model that it was made from")
    check_json_objects(directory, _CONFIG_FILES, error)
    packed_quantization(read_json_object(directory / MODEL_FILE, error), directory, error)
    return directory


def check_json_objects(directory: Path, names: Sequence[str], error: type[GraloraError]) -> None:
    """Check that those of the files that exist hold a JSON object."""
    for file in names:
        if (directory / file).is_file():
            read_json_object(directory / file, error)


def resolve_directory(
    name_or_path: str | Path,
    error: type[GraloraError],
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """The local directory for `name_or_path`, downloaded from the hub if it is a hub id."""
    remedy = "give a directory or a hub id"
    path, name = usable_path(name_or_path, error, remedy=remedy), str(name_or_path)
    if path.is_dir():
        return path
    if path.is_file():
        raise error(f"{path} is a file; give the directory that holds it")
    if not name.isprintable():
        raise error(f"{shown(name_or_path)} is not a usable path; {remedy}")
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise error(f"no directory {path}; give an existing directory or a hub id")
    from huggingface_hub import snapshot_download  # the hub client is slow to import and seldom needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns and list(patterns)))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as failure:
        reason = str(failure).splitlines()[0]
        raise error(f"no directory {name}, and no such repository can be reached on the hub ({reason})") from failure
