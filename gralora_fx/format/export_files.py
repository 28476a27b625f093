"""The files of an export directory: their names, sizes and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from gralora_fx.format.export_directory import ADAPTERS, MANIFEST_NAME
from gralora_fx.format.manifest import FileEntry


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size in bytes and SHA-256 of files of an export."""
    return {name: FileEntry((directory / name).stat().st_size, digest_of(directory / name)) for name in names}


def file_names(folder: Path) -> list[str]:
    """Every file in a directory and its subdirectories, as POSIX paths.

    Left out are the manifest and the adapters, which come and go, each with a record of its own.
    """
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST_NAME and not name.startswith(f"{ADAPTERS}/"))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
