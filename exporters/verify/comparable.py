"""The two sides of a comparison: an opened export and the model, in each state of the adapters."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gralora_fx.base.sources.lazy_tensors import lazy_parameter, values_of
from gralora_fx.core.graph.surgery import copied, map_parameters
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.normalize.modes import set_mode
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import base_trace, fold_adapters, is_streamed
from gralora_fx.exporters.translation.export_graphs import DTYPES, cast_graph, precision_of
from gralora_fx.exporters.verify.greedy_tokens import RowSteps
from gralora_fx.exporters.verify.tolerances import arithmetic_of
from gralora_fx.format.export_directory import PAST_SEQLENS, ROWS_NAME
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.sessions.session import CPU, Runtime, mapped_options, open_session, yielding_options

Arrays = Mapping[str, NDArray[Any]]
_COPIED = 2**30  # bytes of an export whose weights sessions may copy, if its model is streamed
_RUN_ROWS = {CPU, "CUDAExecutionProvider"}  # providers whose attention takes the lengths of rows


class Comparable(NamedTuple):
    """An export, or its float32 copy, opened for comparison."""

    session: Any
    rows: Any  # a session over the graph of rows; None without one, or if the providers may not run it
    arithmetic: str  # precision of the run
    companions: Mapping[str, Any]  # sessions of companions, and of graphs that other programs run instead


@contextmanager
def open_comparable(
    directory: Path, manifest: Manifest, runtime: Runtime | None = None, *, streamed: bool = False
) -> Iterator[Comparable]:
    """Open sessions over an export, or its float32 copy where needed, while the block runs.

    Those of a streamed model take turns, and if it is large read weights from their files, without copies for faster
    products.
    """
    in_turn = streamed and runtime is None
    if in_turn:
        from gralora_fx.exporters.verify.mapped_sessions import mapped_runtime

        runtime = mapped_runtime(directory, _COPIED)
    precision, is_on_cpu = manifest.precision, runtime is None or runtime.providers[0][0] == CPU
    if manifest.quantization is None and (precision != "bf16" or not is_on_cpu):
        yield _opened(directory, manifest, runtime, precision, in_turn=in_turn)
        return
    from gralora_fx.exporters.verify.quantized_references import write_float32_copy

    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.absolute().parent) as copy:
        write_float32_copy(directory, Path(copy))
        precision = "fp16" if precision == "fp16" else "fp32"
        opened = _opened(Path(copy), manifest, runtime, precision, in_turn=in_turn)
        if in_turn:  # they are opened again
            yield opened
            return
    yield opened


def _opened(
    directory: Path, manifest: Manifest, runtime: Runtime | None, precision: str, *, in_turn: bool
) -> Comparable:
    is_known = runtime is None or (not runtime.devices and {name for name, _ in runtime.providers} <= _RUN_ROWS)
    opened = runtime or Runtime(session_options=yielding_options())
    # `model.onnx` as others open it; rows as they are served
    openings = [partial(open_session, directory, opened, as_stored=True)]
    if is_known and manifest.has_rows:
        openings.append(partial(open_session, directory, opened, name=ROWS_NAME))
    if in_turn and len(openings) > 1:
        from gralora_fx.exporters.verify.mapped_sessions import in_turn as opened_in_turn

        session, *rows = opened_in_turn(*openings)
    else:
        session, *rows = [opening() for opening in openings]
    if runtime is not None:
        precision = arithmetic_of(runtime, precision, is_quantized=manifest.quantization is not None)
    companions = {name: open_session(directory, opened, name=f"{name}.onnx") for name in manifest.companions}
    shared = runtime or Runtime(session_options=mapped_options())
    companions |= {name: open_session(directory, shared, name=f"{name}.onnx") for name in manifest.programs}
    return Comparable(session, rows[0] if rows else None, precision, companions)


@dataclass(frozen=True)
class Variant:
    """An export and the model in one state of the adapters."""

    session: Any
    # with a cache a function that makes the steps of prompts in the graph of rows (see `RowSteps`), else a session;
    # None if it is not compared
    rows: Any
    name: str | None  # the adapter; None for the base, or for an export whose adapters are folded
    active: Callable[[], AbstractContextManager[None]]  # activates this state in the model while the block runs
    build: Callable[[], TracedModel | GraloraModel]
    companions: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # sessions of companion models
    tensors: Arrays = dataclasses.field(default_factory=dict)  # tensors of an adapter as data, as exported

    @cached_property
    def reference(self) -> TracedModel | GraloraModel:
        """The model to compare with: itself, or one with the export's rounded weights."""
        return self.build()


def variants(
    session: Any,
    model: TracedModel | GraloraModel,
    manifest: Manifest,
    directory: Path,
    adapter_name: str | None = None,
    rows: Any = None,
    companions: Mapping[str, Any] | None = None,
) -> Iterator[Variant]:
    """Yield the states to compare an export in: one if adapters are folded, else the base and each active adapter."""
    inputs, beside = manifest.adapter_inputs, dict(companions or {})
    if adapter_name is not None:
        from gralora_fx.exporters.verify.adapters_as_data import check_named

        check_named(adapter_name, model, inputs, directory)
    by_row = partial(_rows_with, rows, Adapters(directory, manifest))
    if inputs is None:
        build = partial(reference_model, model, manifest, directory)
        yield Variant(session, by_row(None, ()), None, nullcontext, build, beside)
        return
    from gralora_fx.exporters.artifact.base_parameters import BaseParameters
    from gralora_fx.exporters.verify.adapters_as_data import session_with, tensors_of, with_folded

    rounded = cache(partial(reference_model, base_trace(model), manifest, directory))  # shared by all states

    def reference(tensors: Arrays) -> TracedModel | GraloraModel:
        return model if rounded() is base_trace(model) else with_folded(base_trace(rounded()), tensors, inputs)

    names = model.active_adapters if isinstance(model, GraloraModel) else []
    there = [adapter_name or name for name in names]
    base = BaseParameters(directory, manifest)
    adapters = [tensors_of(*pair, model, base) for pair in zip(names, there, strict=True)]
    disabled = model.disable_adapter if isinstance(model, GraloraModel) else nullcontext
    own = session_with(session, inputs, {})
    others = {part: session_with(other, inputs, {}) for part, other in beside.items()}
    yield Variant(own, by_row(None, there), None, disabled, partial(reference, {}), others)
    if not isinstance(model, GraloraModel):
        return
    for name, exported, tensors in zip(names, there, adapters, strict=True):
        own, own_rows = session_with(session, inputs, tensors), by_row(exported, there)
        others = {part: session_with(other, inputs, tensors) for part, other in beside.items()}
        yield Variant(own, own_rows, name, partial(_only, model, name), partial(reference, tensors), others, tensors)


def _rows_with(session: Any, adapters: Adapters, name: str | None, names: Sequence[str]) -> Any:
    """Return a runner of `model_rows.onnx` with an adapter or none, beside rows with others (see `Variant`)."""
    if session is None:
        return None
    if any(value.name == PAST_SEQLENS for value in session.get_inputs()):
        others = [other for other in (None, *names) if other != name] or [name]
        return partial(RowSteps, session, adapters, name, others)
    from gralora_fx.exporters.verify.adapters_as_data import MixedRows

    return MixedRows(session, adapters, name, names)


@contextmanager
def _only(model: GraloraModel, name: str) -> Iterator[None]:
    """Activate one adapter only while the block runs."""
    before = model.active_adapters
    model.set_adapter(name)
    try:
        with model._state.acting_everywhere():  # as the export, which reads active tokens only
            yield
    finally:
        model.set_adapter(before)


@contextmanager
def evaluating(model: TracedModel | GraloraModel, reference: TracedModel | GraloraModel) -> Iterator[None]:
    """Set the reference to evaluation mode while the block runs, then to the model's mode."""
    was_training = model.training
    reference.eval()
    try:
        yield
    finally:
        reference.train(was_training)


def reference_model(
    model: TracedModel | GraloraModel, manifest: Manifest, directory: Path
) -> TracedModel | GraloraModel:
    """Return the model; for an export of another precision, an adapter-free model with the same rounded weights.

    A quantized weight is the export's; whether the model's weight rounds to it, `stored_weights` compares.
    """
    precision, quantized = manifest.precision, manifest.quantization
    traced = base_trace(model)
    if quantized is None and {precision, precision_of(traced.graph_module)} == {"fp32"}:
        return model
    reference = float32_model(fold_adapters(model, untie=True), precision, streamed=is_streamed(model))
    if quantized is None:
        return reference
    from gralora_fx.exporters.verify.quantized_references import with_stored_weights

    return with_stored_weights(reference, traced, quantized, directory)


def float32_model(traced: TracedModel, precision: str, *, streamed: bool = False) -> TracedModel:
    """Return the model in float32 arithmetic with rounded weights, copied, or made on reading in a streamed model."""
    dtype = DTYPES[precision]
    graph_module = copied(traced.graph_module, "RoundedGraph")
    set_mode(graph_module.graph, False)
    graph_module = cast_graph(graph_module, "fp32")

    def cast(parameter: nn.Parameter, name: str) -> nn.Parameter:
        def rounded() -> Tensor:
            values = values_of(parameter, name)
            return values.to(dtype).float() if values.is_floating_point() else values

        if streamed:
            return lazy_parameter(
                rounded, parameter.shape, torch.float32 if parameter.is_floating_point() else parameter.dtype
            )
        return nn.Parameter(rounded(), requires_grad=False)

    map_parameters(graph_module, cast)
    graph_parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    names = {
        id(own): graph_parameters[name] for name, own in traced.tree.parameters.items() if name in graph_parameters
    }  # under other names too
    parameters = {name: names.get(id(own), own) for name, own in traced.tree.parameters.items()}
    return traced.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters)).eval()
