"""An export directory opened to be folded into: its manifest and its ONNX files, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.folding.stored import check_ranges
from gralora_fx.runtime.export_files import check_files
from gralora_fx.runtime.manifest import Manifest, read_manifest
from gralora_fx.runtime.names import MANIFEST_NAME
from gralora_fx.runtime.session import check_external_data


@dataclass(frozen=True)
class Opened:
    """An export directory.

    Attributes:
        directory: Where it is.
        manifest: Its manifest; None of other exporters' directories.
        models: Its models by file; external weights are not read.
        companions: Its other files, data files left out, as POSIX paths.
        data: Its data files.
    """

    directory: Path
    manifest: Manifest | None
    models: Mapping[str, ir.Model]
    companions: tuple[str, ...]
    data: tuple[Path, ...]


def open_export(onnx_dir: str | Path) -> Opened:
    """Open an export directory.

    Args:
        onnx_dir: A directory with one or several ONNX files.

    Raises:
        ExportError: It is not a directory, holds no ONNX model, or one that cannot be read; a data file is missing,
            truncated or a link; or the manifest says that files differ or that adapters are not merged.
    """
    directory = Path(onnx_dir)
    if not directory.is_dir():
        raise ExportError(f"{directory} is not a directory; give the directory of an export")
    files = sorted(path for path in directory.glob("*.onnx"))
    if not files:
        raise ExportError(f"{directory} holds no ONNX model (*.onnx); give the directory of an export")
    manifest = read_manifest(directory) if (directory / MANIFEST_NAME).is_file() else None
    if manifest is not None:
        check_files(directory, manifest, digests=False)
        if manifest.adapters_mode != "merged":
            raise ExportError(
                f"{directory} holds its adapters apart ({manifest.adapters_mode}), to be loaded when it is served; "
                "fold into an export with adapters='merged'"
            )
    models = {path.name: _load(path) for path in files}
    data = {Path(t.path) for model in models.values() for t in _external(model)}
    known = {*files, *data, directory / MANIFEST_NAME}
    others = [path for path in sorted(directory.rglob("*")) if path not in known and not path.is_dir()]
    if links := [path for path in others if path.is_symlink()]:
        raise ExportError(f"{links[0]} is a link; copy the file itself into the directory")
    companions = tuple(path.relative_to(directory).as_posix() for path in others)
    return Opened(directory, manifest, models, companions, tuple(sorted(data)))


def _load(path: Path) -> ir.Model:
    check_external_data(path)
    try:
        model = ir.load(path)
    except Exception as failure:  # protobuf and onnx_ir raise types of their own
        raise ExportError(f"{path} is not an ONNX model ({first_line(failure)}); export the model again") from failure
    check_ranges(path, model)
    return model


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    graphs = (model.graph, *model.graph.subgraphs())
    tensors = [value.const_value for graph in graphs for value in graph.initializers.values()]
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
