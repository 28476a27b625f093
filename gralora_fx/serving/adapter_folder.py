"""Adapter files: those of an export's own directory, and the paths that callers give."""

from __future__ import annotations

from pathlib import Path

from gralora_fx.errors import ServingError, first_line, shown
from gralora_fx.runtime.adapter_record import SUFFIX, record_path
from gralora_fx.runtime.links import check_own_file
from gralora_fx.runtime.names import ADAPTERS


def own_adapters(directory: Path) -> dict[str, Path]:
    """The adapter files in an export's directory, by name.

    Raises:
        ServingError: One of them, or its record, is a link out of the directory.
    """
    folder = directory / ADAPTERS
    if folder.is_symlink():
        raise ServingError(f"{folder} is a link; copy the directory itself into the export directory")
    found = {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    for path in found.values():
        check_own_file(path, ServingError)
        check_own_file(record_path(path), ServingError)
    return found


def adapter_path(path: str | Path) -> Path:
    """The absolute path of an adapter file; that it is there is for its reader to find.

    Raises:
        ServingError: It is not a path, a directory, or a file of another kind.
    """
    try:
        file = Path(path).absolute()
        is_folder = file.is_dir()
    except (TypeError, ValueError, OSError) as error:
        raise ServingError(f"{shown(path)} is not the path of a file ({first_line(error)})") from error
    if is_folder or file.suffix != SUFFIX:
        raise ServingError(f"{file} is not an {SUFFIX} file; gralora-fx export-adapter makes one of a PEFT adapter")
    return file
