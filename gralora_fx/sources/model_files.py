"""The files of a saved model beside its weights: whether they are there and what they should be."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gralora_fx.errors import GraloraError

_CONFIG_FILES = ("config.json", "generation_config.json")


def read_json_object(path: Path, error: type[GraloraError]) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: The file.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: it cannot be read, is not JSON in UTF-8, or holds something else.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:  # a UnicodeDecodeError is a ValueError too
        raise error(f"{path} cannot be read as JSON ({failure}); it may be truncated, so copy it again") from failure
    if not isinstance(found, dict):
        raise error(f"{path} holds {'null' if found is None else f'a {type(found).__name__}'}, not a JSON object")
    return found


def local_directory(name: str | Path, error: type[GraloraError]) -> Path | None:
    """The directory that a name stands for, or None for a hub id.

    Args:
        name: Local directory or hub id.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: it is a file, or cannot be a path.
    """
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{str(name)[:80]!r} cannot be a path ({reason}); give a local directory or a hub id") from failure
    if not stat.S_ISDIR(mode):
        raise error(f"{path} is not a directory; give the directory that holds it")
    return path


def check_model_files(name: str | Path, error: type[GraloraError]) -> Path | None:
    """Refuse a local directory that is not a saved model, before anything of it is loaded.

    Args:
        name: Local directory or hub id.
        error: The error type to raise.

    Returns:
        The local directory; None for a hub id, of which nothing is known.

    Raises:
        GraloraError: Of the given type: there is no such directory, it has no `config.json`, or a configuration file is
            damaged.
    """
    directory = local_directory(name, error)
    if directory is None:
        if Path(name).is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
            raise error(
                f"no model can be loaded from {name} (there is no such directory); give a directory or a hub id"
            )
        return None
    if not (directory / _CONFIG_FILES[0]).is_file():
        raise error(f"no {_CONFIG_FILES[0]} in {directory}; give the directory of a saved model")
    check_json_objects(directory, _CONFIG_FILES, error)
    return directory


def check_json_objects(directory: Path, names: Sequence[str], error: type[GraloraError]) -> None:
    """Refuse a directory where one of these files is there and does not hold a JSON object.

    Raises:
        GraloraError: Of the given type; it names the file.
    """
    for file in names:
        if (directory / file).is_file():
            read_json_object(directory / file, error)
