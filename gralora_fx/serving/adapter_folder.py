"""Adapters that callers give, as data of an export."""

from __future__ import annotations

from pathlib import Path


def as_data(source: Path, onnx_dir: Path, folder: Path, name: str) -> Path:
    """An adapter as data of an export: the file itself, or one made of a directory that PEFT saved.

    Args:
        source: The file or the directory (see `adapter_path`).
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
