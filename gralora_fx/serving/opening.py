"""The directory of an export: its path, its configuration, and whether it is still the one that was opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gralora_fx.errors import ServingError
from gralora_fx.runtime.manifest import Manifest, read_manifest
from gralora_fx.sources.model_files import read_json_object
from gralora_fx.sources.paths import usable_path


def directory_of(export_dir: str | Path) -> Path:
    """The absolute path of a directory, which stays valid if the process changes its working directory.

    Raises:
        ServingError: It is not a path.
    """
    return usable_path(export_dir, ServingError, remedy="give the directory of an export").absolute()


def read_config(directory: Path) -> dict[str, Any]:
    """The model's `config.json`; empty if there is none.

    Raises:
        ServingError: It cannot be read.
    """
    path = directory / "config.json"
    return read_json_object(path, ServingError) if path.is_file() else {}


def check_unchanged(directory: Path, manifest: Manifest) -> None:
    """Check that a directory was not moved or replaced by another export since it was opened.

    Args:
        directory: The directory.
        manifest: What its manifest said then.

    Raises:
        ServingError: It was moved or replaced.
    """
    if not directory.is_dir():
        raise ServingError(f"{directory} was moved or removed after it was loaded; load it from where it is")
    if read_manifest(directory, ServingError) != manifest:
        raise ServingError(f"{directory} holds another export than when it was loaded; load it again")
