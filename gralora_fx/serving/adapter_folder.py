"""Adapter files that callers give: as they are, or made of what PEFT saved."""

from __future__ import annotations

from pathlib import Path

from gralora_fx.errors import ServingError
from gralora_fx.runtime.adapter_name import SUFFIX
from gralora_fx.sources.paths import usable_path


def adapter_path(path: str | Path) -> Path:
    """The absolute path of an adapter file; that it is there is for its reader to find.

    Raises:
        ServingError: It is not a path, a directory, or a file of another kind.
    """
    file = usable_path(path, ServingError, remedy="give the path of an .onnx_adapter file").absolute()
    if file.is_dir() or file.suffix != SUFFIX:
        raise ServingError(f"{file} is not an {SUFFIX} file; export_adapter makes one of a PEFT adapter")
    return file


def as_data(source: Path, onnx_dir: Path, folder: Path, name: str) -> Path:
    """An adapter as data of an export: the file itself, or one made of a directory that PEFT saved.

    Args:
        source: The file or the directory (see `given_adapter`).
        onnx_dir: The export, which takes adapters as data.
        folder: Where a file is made.
        name: The adapter's name.

    Raises:
        GraloraError: It cannot be converted (see `export_adapter`).
    """
    if not source.is_dir():
        return source
    from gralora_fx.exporters.adapter import convert_adapter  # serving needs no exporter otherwise

    return convert_adapter(source, onnx_dir, folder, name)
