"""What an export directory contains, by its manifest: read and checked without torch or a model."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gralora_fx.errors import ExportError, GraloraError
from gralora_fx.runtime.names import MANIFEST_NAME

SCHEMA_VERSION = 1
# files that serving or a tokenizer reads when they are there, by the names that libraries look for
_READ = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "*.onnx", "*.onnx_data", "vocab.txt", "merges.txt")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an export directory.

    Raises:
        ExportError: There is none, it cannot be read, or it is of a newer schema.
    """
    path = Path(directory) / MANIFEST_NAME
    if path.parent.is_file():
        raise ExportError(f"{directory} is a file; give the directory of the export, {path.parent.parent}")
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"no {MANIFEST_NAME} in {directory}; give the directory of an export") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read ({error}); export the model again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema_version"), int):
        raise ExportError(f"{path} is no manifest of an export; export the model again")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise ExportError(
            f"{path} has schema {manifest['schema_version']}, newer than {SCHEMA_VERSION}; update gralora-fx"
        )
    return dict(manifest)


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files of an export.

    Args:
        directory: The export directory.
        names: Paths within it.
    """
    return {name: {"size": (directory / name).stat().st_size, "sha256": _sha256(directory / name)} for name in names}


def check_files(
    directory: str | Path,
    manifest: Mapping[str, Any],
    *,
    digests: bool,
    error: type[GraloraError] = ExportError,
) -> int:
    """Compare the files of an export directory with what its manifest says of them.

    Files that the manifest does not name are allowed, such as a README; with `digests` none that would be read.

    Args:
        directory: An export directory.
        manifest: Its manifest.
        digests: Whether to read every file and compare its SHA-256; sizes are compared always.
        error: The error type to raise.

    Returns:
        How many files were compared; 0 for a manifest without them, of an export made before they were recorded.

    Raises:
        GraloraError: Of the given type, naming each file that is missing or differs; or digests are asked for and the
            manifest has none.
    """
    folder = Path(directory)
    if "files" not in manifest:
        if digests:
            raise error(f"{folder / MANIFEST_NAME} has no digests of its files; export the model again to get them")
        return 0
    files = _file_facts(manifest["files"], folder / MANIFEST_NAME, error)
    problems = [problem for name, facts in files.items() for problem in _differences(folder, name, facts, digests)]
    if digests:
        problems += [f"{name} is not in the manifest, but would be read" for name in _unnamed(folder, files)]
    if problems:
        raise error(f"{folder} is not what was exported: {'; '.join(problems)}. Copy the directory or export it again")
    return len(files)


def _differences(folder: Path, name: str, facts: Mapping[str, Any], digests: bool) -> Iterator[str]:
    path = folder / name
    try:
        size = path.stat().st_size
        if not path.is_file():
            yield f"{name} is not a file"
        elif size != facts["size"]:
            yield f"{name} has {size:,} bytes instead of {facts['size']:,}"
        elif digests and _sha256(path) != facts["sha256"]:
            yield f"{name} has another SHA-256 than the manifest says"
    except FileNotFoundError:
        yield f"{name} is missing"
    except (OSError, ValueError) as failure:
        yield f"{name} cannot be read ({failure})"


def _file_facts(files: Any, path: Path, error: type[GraloraError]) -> dict[str, Mapping[str, Any]]:
    """The manifest's entry `files`, if every name is a path within the directory and every fact of its type."""
    entries: Iterable[tuple[Any, Any]] = files.items() if isinstance(files, dict) else [(None, None)]
    for name, facts in entries:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        is_within = bool(parts) and not name.startswith("/") and ".." not in parts
        is_described = (
            isinstance(facts, dict) and type(facts.get("size")) is int and isinstance(facts.get("sha256"), str)
        )
        if not (is_within and is_described):
            raise error(f"{path} does not describe its files as an export does ({name!r:.80}); export the model again")
    return dict(files)


def _unnamed(folder: Path, files: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name in file_names(folder)
        if name not in files and any(fnmatch.fnmatch(PurePosixPath(name).name.lower(), pattern) for pattern in _READ)
    ]


def file_names(folder: Path) -> list[str]:
    """Every file of a directory and the folders in it but the manifest, as POSIX paths."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST_NAME)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
