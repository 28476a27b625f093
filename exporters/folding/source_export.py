"""An export directory that is folded into: its manifest and its ONNX files, opened and checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.folding.initializers import external_tensors, stored_bytes
from gralora_fx.runtime.export_directory import MANIFEST_NAME, not_an_export
from gralora_fx.runtime.export_files import check_files
from gralora_fx.runtime.manifest import Manifest, read_manifest
from gralora_fx.runtime.session import check_external_data
from gralora_fx.sources.model_files import described
from gralora_fx.sources.paths import usable_path

# companions of a lone file: configuration and tokenizer
_BESIDE = ("*config.json", "*token*.json", "vocab.*", "merges.txt", "*.jinja", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class SourceExport:
    """An export directory.

    Attributes:
        directory: Where it is.
        manifest: Its manifest; None of other exporters' directories.
        models: Its models by file; external weights are not read.
        companions: Its other files, data files left out, as POSIX paths.
        data: Its data files.
        is_lone_file: Whether an ONNX file is given that no manifest describes, so that it alone is folded into.
    """

    directory: Path
    manifest: Manifest | None
    models: Mapping[str, ir.Model]
    companions: tuple[str, ...]
    data: tuple[Path, ...]
    is_lone_file: bool


def open_export(onnx_dir: str | Path) -> SourceExport:
    """Open an export directory.

    Args:
        onnx_dir: A directory with one or several ONNX files, or such a file: the export is its directory.

    Raises:
        ExportError: There is no such directory or file, it holds no ONNX model, or one that cannot be read; a data
            file is missing, truncated or a link; or the manifest says that files differ or that adapters are not
            merged.
    """
    directory, file = _directory_and_file(onnx_dir)
    files = [file] if file is not None else sorted(directory.glob("*.onnx")) if os.path.isdir(directory) else []
    if not files:
        if os.path.isdir(directory) and described(directory) not in ("is a model", "is an adapter"):
            raise ExportError(f"{directory} holds no ONNX model (*.onnx); give the directory of an export")
        raise ExportError(not_an_export(directory))
    manifest = read_manifest(directory) if (directory / MANIFEST_NAME).is_file() else None
    if manifest is not None:
        check_files(directory, manifest, digests=False)
        if manifest.adapters_mode != "merged":
            raise ExportError(
                f"{directory} holds its adapters apart ({manifest.adapters_mode}), to be loaded when it is served; "
                "fold into an export with adapters='merged'"
            )
    models = {path.name: _load(path) for path in files}
    data = {Path(tensor.path) for model in models.values() for _, tensor in external_tensors(model)}
    known = {*files, *data, directory / MANIFEST_NAME}
    others = [path for path in _others(directory, file) if path not in known and not path.is_dir()]
    if links := [path for path in others if path.is_symlink()]:
        raise ExportError(f"{links[0]} is a link; copy the file itself into the directory")
    companions = tuple(path.relative_to(directory).as_posix() for path in others)
    return SourceExport(directory, manifest, models, companions, tuple(sorted(data)), file is not None)


def _directory_and_file(onnx_dir: str | Path) -> tuple[Path, Path | None]:
    """The directory of an export that is given as such or as its ONNX file, and that file if no manifest describes it.

    Raises:
        ExportError: The path is not usable, or is a file of another kind.
    """
    path = usable_path(onnx_dir, ExportError, remedy="give the directory of an export, or an ONNX file")
    if not path.is_file():
        return path, None
    if path.suffix != ".onnx":
        raise ExportError(f"{path} is not an ONNX file (*.onnx); give one, or the directory of an export")
    return path.parent, None if (path.parent / MANIFEST_NAME).is_file() else path


def _others(directory: Path, file: Path | None) -> Iterator[Path]:
    """Files that may be companions: all of an export's directory, beside a lone file what says how it is used."""
    if file is None:
        yield from sorted(directory.rglob("*"))
    else:
        yield from sorted({path for pattern in _BESIDE for path in directory.glob(pattern)})


def _load(path: Path) -> ir.Model:
    check_external_data(path)
    try:
        model = ir.load(path)
    except Exception as failure:  # protobuf and onnx_ir raise types of their own
        raise ExportError(f"{path} is not an ONNX model ({first_line(failure)}); export the model again") from failure
    for name, tensor in external_tensors(model):
        place, size = stored_bytes(tensor), Path(tensor.path).stat().st_size
        if place.end > size or tensor.length not in (None, tensor.nbytes):
            raise ExportError(
                f"{tensor.path} has {size:,} bytes, but {name} of {path.name} takes bytes {place.begin:,} to "
                f"{place.end:,} of it; it is damaged, so copy or export it again"
            )
    return model
