"""What an export converts: a trace without adapters, the options, and the adapters that stay data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gralora_fx.errors import ExportError
from gralora_fx.exporters.adapters_as_data import DataSites, data_sites
from gralora_fx.exporters.onnx_pipeline import export_log
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.graph.pipeline import PassLog
from gralora_fx.methods import method_of
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.model.merge import merge_lazily
from gralora_fx.tracing.traced_model import CALL_TRACE, TracedModel


@dataclass(frozen=True)
class Conversion:
    """What is converted, and how; each kind of export makes its ONNX models from it.

    Attributes:
        model: What is exported.
        traced: Its trace, the active adapters folded into the weights, or all adapters left out where they are data.
        options: The options of the export.
        log: Receives a report for each pass.
        adapters: The layers whose adapters are data of the ONNX models; None where adapters are folded.
    """

    model: TracedModel | GraloraModel
    traced: TracedModel
    options: ExportOptions
    log: PassLog
    adapters: DataSites | None = None

    @property
    def data_adapters(self) -> tuple[str, ...]:
        """Names of the active adapters, where they become data."""
        model = self.model
        return tuple(model.active_adapters) if isinstance(model, GraloraModel) and self.adapters is not None else ()

    def by_row(self, log: PassLog) -> Conversion:
        """The conversion to a graph in which each row of a batch has an adapter of its own.

        Args:
            log: Receives a report for each of its passes.
        """
        adapters = self.adapters
        if adapters is not None:
            adapters = dataclasses.replace(adapters, inputs=adapters.inputs.by_row())
        return dataclasses.replace(self, log=log, adapters=adapters)


def conversion_of(model: TracedModel | GraloraModel, options: ExportOptions) -> Conversion:
    """What an export of a model converts.

    Args:
        model: A traced model, or a rewritten one with its active adapters.
        options: The options of the export.

    Raises:
        ExportError: The model is of another type, the options do not fit it, it is to be compared and cannot be run,
            an adapter cannot be data, or graphs cannot be dumped.
        MergeError: An adapter cannot be folded.
    """
    if isinstance(model, (TracedModel, GraloraModel)):
        configs = model.configs if isinstance(model, GraloraModel) else {}
        methods = {name: method_of(config) for name, config in configs.items()}
        options.check_model(methods=methods, task=base_trace(model).task)
        if options.level is not None:
            check_runnable(model)
    log = export_log(options.dump)
    if options.adapters == "merged" or not isinstance(model, GraloraModel):
        return Conversion(model, fold_adapters(model), options, log)
    return Conversion(model, model.traced, options, log, data_sites(model, options))


def fold_adapters(model: TracedModel | GraloraModel) -> TracedModel:
    """The adapter-free model: the traced model itself, or a rewritten one with its active adapters folded lazily.

    Raises:
        ExportError: The model is neither.
        MergeError: An adapter cannot be folded.
    """
    if isinstance(model, TracedModel):
        return model
    if not isinstance(model, GraloraModel):
        raise ExportError(
            f"cannot export a {type(model).__name__}; {CALL_TRACE} and give what it or rewrite() returned"
        )
    return merge_lazily(model) if model.active_adapters else model.traced


def base_trace(model: TracedModel | GraloraModel) -> TracedModel:
    """The trace of the base model, without adapters."""
    return model.traced if isinstance(model, GraloraModel) else model


def check_runnable(model: TracedModel | GraloraModel) -> None:
    """Check that a model is a traced or rewritten one whose weights are in memory.

    Raises:
        ExportError: It is not.
    """
    if not isinstance(model, (TracedModel, GraloraModel)):
        raise ExportError(f"cannot run a {type(model).__name__}; {CALL_TRACE} and give what it or rewrite() returned")
    traced = base_trace(model)
    missing = next((name for name, parameter in traced.tree.parameters.items() if parameter.is_meta), None)
    if missing is not None:
        raise ExportError(
            f"{missing} has no values in memory, so there is nothing to compare with; export a streamed model with "
            "verify=False, and compare the export with the model loaded whole (verify_onnx)"
        )
