"""ONNX Runtime sessions over an export directory, opened only if its model reads no outside files."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from gralora_fx.base.compat.onnx_messages import ModelProto, TensorProto
from gralora_fx.base.sources.model_files import usable_path
from gralora_fx.errors import ExportError, GraloraError, first_line
from gralora_fx.format.export_directory import DECODER, ENCODER, MODEL_NAME, PAST_SEQLENS, check_own_file

if TYPE_CHECKING:
    import onnx

    from gralora_fx.run.sessions.plugins import Device

CPU = "CPUExecutionProvider"
FATAL = 4  # ONNX Runtime's log level above errors, which are raised as exceptions already

_COMPILED, _LOCATION = "EPContext", "location"  # an operator, and the key of external data that names a file
_HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
_LEFT_OUT = "optimization.disable_specified_optimizers"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

QUIET_RUN = onnxruntime.RunOptions()  # leaves errors of a run to exceptions
QUIET_RUN.log_severity_level = FATAL


@dataclass(frozen=True)
class Runtime:
    """ONNX Runtime's configuration for a model.

    Attributes:
        providers: Execution providers in order of preference, each with its options; empty if the session options hold
            them.
        session_options: Session options; None for those of `quiet_options`.
        devices: The devices of plug-in providers; the session options then hold all providers.
        threads: Threads of an operator, from the session options or ONNX Runtime's default; None if unknown.
    """

    providers: tuple[tuple[str, Mapping[str, Any]], ...] = ((CPU, {}),)
    session_options: onnxruntime.SessionOptions | None = field(default=None, compare=False)
    devices: tuple[Device, ...] = ()
    threads: int | None = None


# optimizers that a decoder's graph of rows went through when it was exported: a sixth of the time of opening it
_DONE = ["CommonSubexpressionElimination"]


def quiet_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Return session options that report errors by exceptions only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def yielding_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Return `quiet_options` whose threads stop spinning when a run ends.

    When runs alternate with PyTorch's, spinning threads take the cores from it: each of its operations then takes many
    times as long.
    """
    options = quiet_options(threads)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def mapped_options() -> onnxruntime.SessionOptions:
    """Return `yielding_options` of sessions that read weights from their files, without copies in other layouts."""
    options = yielding_options()
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def open_session(
    directory: str | Path,
    runtime: Runtime | None = None,
    *,
    name: str = MODEL_NAME,
    as_stored: bool = False,
    weights: Container[str] | None = None,
    error: type[GraloraError] = ExportError,
) -> Any:
    """Open a model of a directory as an `onnxruntime.InferenceSession`, or two as an `EncoderDecoderSession`."""
    folder, runtime = usable_path(directory, error), runtime or Runtime()
    if name == MODEL_NAME and (folder / f"{ENCODER}.onnx").is_file():
        parts = [_open(folder / f"{name}.onnx", runtime, error, as_stored, weights) for name in (ENCODER, DECODER)]
        from gralora_fx.run.sessions.session_pair import EncoderDecoderSession

        return EncoderDecoderSession(*parts)
    return _open(folder / name, runtime, error, as_stored, weights)


def _open(
    path: Path, runtime: Runtime, error: type[GraloraError], as_stored: bool, weights: Container[str] | None
) -> Any:
    if not path.is_file():
        raise error(f"no {path.name} in {path.parent}; give the directory of an export")
    model = check_external_data(path, error, weights)
    providers = [] if runtime.devices else [(name, dict(options)) for name, options in runtime.providers]
    options = runtime.session_options or quiet_options()
    if not _folds_constants(options) and _widens_scales(model):  # such scales would be read as zeros
        options.add_session_config_entry("session.disable_prepacking", "1")
    is_cpu = not runtime.devices and [name for name, _ in runtime.providers[:1]] == [CPU]
    changes = (
        _take_defaults if runtime.devices else None,
        _call_functions if is_cpu and not as_stored else None,
        _add_exactly if is_cpu or not (runtime.providers or runtime.devices) else None,
    )
    try:
        changed = [change(model) for change in changes if change is not None]
        if any(changed):  # in-memory model bytes have no directory to find weights in
            _read_weights_in(path.parent, options)
        session = onnxruntime.InferenceSession(
            model.SerializeToString() if any(changed) else str(path),
            options,
            providers=providers or None,
            enable_fallback=0,
            disabled_optimizers=_DONE if any(value.name == PAST_SEQLENS for value in model.graph.input) else None,
        )
    except Exception as failure:  # ONNX Runtime raises types of its own, without a common base
        from gralora_fx.base.compat.onnxruntime import NoKernel

        advice = "export the model again"
        if isinstance(failure, NoKernel):
            names = ", ".join(name for name, _ in runtime.providers) or "the providers of the session options"
            advice = f"{names} cannot compute it: give providers that can, or export in another precision"
        elif runtime.devices:
            advice = f"check the options of {runtime.devices[0].provider}, or leave it out"
        raise error(f"ONNX Runtime cannot load {path} ({_reason(failure)}); {advice}") from failure
    missing = [name for name, _ in runtime.providers if name not in session.get_providers()]
    if missing:
        raise error(
            f"ONNX Runtime could not start {', '.join(missing)} and would run {path.name} on "
            f"{', '.join(session.get_providers())}; install what the provider needs, or leave it out"
        )
    return session


def _read_weights_in(folder: Path, options: onnxruntime.SessionOptions) -> None:
    """Set the directory of external weights for a model opened from bytes; ONNX Runtime warns if it is set twice."""
    if _entry(options, _WEIGHTS_FOLDER) != str(folder):
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))


def _entry(options: onnxruntime.SessionOptions, key: str) -> str:
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:  # there is none
        return ""


def _folds_constants(options: onnxruntime.SessionOptions) -> bool:
    is_off = options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return not is_off and "ConstantFolding" not in _entry(options, _LEFT_OUT)


def _widens_scales(model: onnx.ModelProto) -> bool:
    """Return whether products with blocks read scales through a cast from 16 bits."""
    halves = {tensor.name for tensor in model.graph.initializer if tensor.data_type in _HALVES}
    nodes = list(_within(model.graph.node))
    widened = {node.output[0] for node in nodes if node.op_type == "Cast" and node.input[0] in halves}
    return any(node.op_type in ("MatMulNBits", "QMoE") and not widened.isdisjoint(node.input) for node in nodes)


def _call_functions(model: onnx.ModelProto) -> bool:
    """Call a model's functions for the CPU in place, if it may have any (see `call_cpu_functions`)."""
    if not model.functions:
        return False
    from gralora_fx.run.sessions.cpu_functions import call_cpu_functions

    return call_cpu_functions(model)


def _add_exactly(model: onnx.ModelProto) -> bool:
    """Let products of int8 be added exactly, if this processor does not do so (see `offset_weights`)."""
    if not any(tensor.data_type == TensorProto.INT8 for tensor in model.graph.initializer):
        return False
    from gralora_fx.run.sessions.integer_sums import adds_exactly, offset_weights

    return not adds_exactly() and offset_weights(model, list(_within(model.graph.node)))


def _take_defaults(model: onnx.ModelProto) -> bool:
    """Drop defaults of initializers that are also inputs, as OpenVINO's provider requires; return whether any were."""
    inputs = {value.name for value in model.graph.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    if len(kept) == len(model.graph.initializer):
        return False
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return True


def _reason(failure: Exception) -> str:
    """Return the first meaningful line of an error, without OpenVINO's lines about its own source files."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    telling = [line for line in lines if not any(mark in line for mark in ("Exception from src/", " failed at src/"))]
    return telling[0] if telling and telling[0] is not lines[0] else first_line(failure)


def check_external_data(
    path: Path, error: type[GraloraError] = ExportError, weights: Container[str] | None = None
) -> onnx.ModelProto:
    """Check that a model reads no files outside its directory.

    ONNX Runtime follows hard links to external data, so a crafted model could read any file of the machine; some
    execution providers read compiled parts of a graph from paths that its `EPContext` nodes name.
    """
    check_own_file(path, error)
    try:
        content = path.read_bytes()
        model: onnx.ModelProto = ModelProto.FromString(content)
    except Exception as failure:  # protobuf raises types of its own
        raise error(f"{path} is not an ONNX model ({failure}); export the model again") from failure
    locations = _locations(model.graph.initializer)
    # walking all nodes takes long; they name a file or a compiled part only if these words occur in the file
    if _COMPILED.encode() in content or content.count(_LOCATION.encode()) != len(locations):
        nodes = [node for part in (model.graph, *model.functions) for node in _within(part.node)]
        if compiled := next((node for node in nodes if node.op_type == _COMPILED), None):
            raise error(f"{path} holds a part compiled elsewhere (EPContext {compiled.name!r}); export the model again")
        locations = _locations((*_initializers(model.graph), *_constants(nodes)))
    for location in sorted(set(locations)):
        _check_location(path, location, error)
        if weights is not None and location not in weights:
            raise error(
                f"{path} takes its weights from {location}, which is not a file of the export's weights; copy the "
                "export directory again, or export the model again"
            )
    return model


def _locations(tensors: Iterable[Any]) -> list[str]:
    """Return the files that hold tensors, each as often as a tensor names it."""
    return [
        entry.value
        for tensor in tensors
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == _LOCATION
    ]


def _check_location(path: Path, location: str, error: type[GraloraError]) -> None:
    file = path.parent / location
    if Path(location).name != location:
        raise error(f"{path} keeps weights at {location!r}, outside its directory; do not trust it, or export it again")
    if not file.is_file():
        raise error(f"{file} is missing; copy the whole export directory")
    check_own_file(file, error)


def _within(nodes: Any) -> Iterator[Any]:
    """Yield nodes of a graph, including those of subgraphs."""
    for node in nodes:
        yield node
        for graph in _branches(node):
            yield from _within(graph.node)


def _branches(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)


def _initializers(graph: Any) -> Iterator[Any]:
    """Yield a graph's initializers, including sparse ones and those of subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for branch in _branches(node):
            yield from _initializers(branch)


def _constants(nodes: Sequence[Any]) -> Iterator[Any]:
    """Yield the tensor attributes of nodes."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
