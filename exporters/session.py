"""ONNX Runtime sessions over an export directory, opened only when its files stay within it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from gralora_fx.errors import ExportError, GraloraError
from gralora_fx.exporters.encoder_decoder import DECODER, ENCODER
from gralora_fx.exporters.encoder_decoder_session import EncoderDecoderSession

MODEL_NAME = "model.onnx"


def open_session(
    directory: str | Path,
    providers: Sequence[str] | None = None,
    *,
    error: type[GraloraError] = ExportError,
    options: onnxruntime.SessionOptions | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` over the model of a directory, or an `EncoderDecoderSession` over its two.

    Args:
        directory: An export directory.
        providers: Execution providers; None for the CPU.
        error: The error type to raise.
        options: Session options; None for ONNX Runtime's own, with its log at error level.

    Raises:
        GraloraError: Of the given type, when there is no model, its weights lie outside the directory, or ONNX Runtime
            cannot load it.
    """
    folder = Path(directory)
    if (folder / f"{ENCODER}.onnx").is_file():
        parts = [_open(folder / f"{name}.onnx", providers, error, options) for name in (ENCODER, DECODER)]
        return EncoderDecoderSession(*parts)
    return _open(folder / MODEL_NAME, providers, error, options)


def _open(
    path: Path,
    providers: Sequence[str] | None,
    error: type[GraloraError],
    options: onnxruntime.SessionOptions | None,
) -> Any:
    if not path.is_file():
        raise error(f"no {path.name} in {path.parent}; give the directory of an export")
    check_external_data(path, error)
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers or ["CPUExecutionProvider"]))
    except Exception as failure:  # ONNX Runtime raises types of its own, without a common base
        reason = str(failure).splitlines()[0]
        raise error(f"ONNX Runtime cannot load {path} ({reason}); export the model again") from failure


def check_external_data(path: Path, error: type[GraloraError] = ExportError) -> None:
    """Refuse a model whose external data is not a plain file beside it.

    ONNX Runtime follows symbolic and hard links, so a crafted model could read any file of the machine.

    Raises:
        GraloraError: Of the given type, naming the location.
    """
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as failure:  # protobuf raises types of its own
        raise error(f"{path} is no ONNX model ({failure}); export the model again") from failure
    locations = {
        entry.value
        for tensor in _tensors(graph)
        for entry in tensor.external_data
        if tensor.data_location == onnx.TensorProto.EXTERNAL and entry.key == "location"
    }
    for location in sorted(locations):
        file = path.parent / location
        if Path(location).name != location:
            raise error(f"{path} keeps weights at {location!r}, outside its directory; refuse it or export again")
        if not file.is_file():
            raise error(f"{file} is missing; copy the whole export directory")
        if file.is_symlink() or file.stat().st_nlink > 1:
            raise error(f"{file} is a link; copy the file itself into the export directory")


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor of a graph, those of its branches and constants included."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)
