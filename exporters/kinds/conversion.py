"""The input of an export: a trace without adapters, the options, and the fingerprint of the base."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from gralora_fx.base.sources.lazy_tensors import is_lazy, sampled_values, stored_form_of, without_values
from gralora_fx.core.graph.pipeline import PassLog
from gralora_fx.core.methods import method_of
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.model.rewrite import merge_lazily
from gralora_fx.core.tracing.traced_model import CALL_TRACE, TracedModel
from gralora_fx.errors import ExportError, an
from gralora_fx.exporters.formats import KEPT, Blocks, Format
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.rules.onnx_pipeline import export_log
from gralora_fx.format.adapter_paths import check_can_act

if TYPE_CHECKING:
    from gralora_fx.exporters.kinds.data_sites import DataSites
    from gralora_fx.exporters.quantize.kept_work import KeptWork
    from gralora_fx.exporters.quantize.plan import QuantizationPlan

_SAMPLES = 64  # values of a parameter that the fingerprint samples


@dataclass(frozen=True)
class Conversion:
    """A model to convert, and how; each kind of export makes its ONNX models from it."""

    model: TracedModel | GraloraModel  # what is exported
    # its trace, with active adapters folded into the weights, or without adapters if they are data
    traced: TracedModel
    options: ExportOptions
    log: PassLog  # receives a report for each pass
    # the layers whose adapters are data of the ONNX models; None if adapters are folded
    adapters: DataSites | None = None
    plan: QuantizationPlan | None = None  # how matrices are stored; None for floats
    work: KeptWork | None = None  # results that take long or are read again; a streamed model's are beside the output

    @property
    def data_adapters(self) -> tuple[str, ...]:
        """Names of the active adapters, if they become data."""
        model = self.model
        return tuple(model.active_adapters) if isinstance(model, GraloraModel) and self.adapters is not None else ()

    def check_kind(self, kind: str) -> None:
        """Check that active adapters that tokens activate can be data of a kind of export."""
        for name in self.data_adapters:
            assert isinstance(self.model, GraloraModel)
            adapter = self.model.adapter(name)
            check_can_act(adapter.config.acts_from, f"adapter {name!r}", kind, has_copies=bool(adapter.copies))

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the model's base (see `fingerprint_of`)."""
        return fingerprint_of(self.model)

    def by_row(self, log: PassLog) -> Conversion:
        """Return the conversion to a graph in which each row of a batch has its own adapter."""
        adapters = self.adapters
        if adapters is not None:
            adapters = dataclasses.replace(adapters, inputs=adapters.inputs.by_row())
        return dataclasses.replace(self, log=log, adapters=adapters)


def conversion_of(
    model: TracedModel | GraloraModel, options: ExportOptions, *, has_blocks: bool | None = None
) -> Conversion:
    """Return the conversion of a model by an export's options.

    `has_blocks` says whether adapters as data have GraLoRA's blocks; None chooses the faster form (`takes_blocks`).
    """
    stored = False
    if isinstance(model, (TracedModel, GraloraModel)):
        stored = any(stored_form_of(site.weight) is not None for site in base_trace(model).sites if site.calls)
        options = options.for_base(is_in_few_bits=stored)
        configs = model.configs if isinstance(model, GraloraModel) else {}
        methods = {name: method_of(config) for name, config in configs.items()}
        options.check_model(methods=methods, task=base_trace(model).task)
        if options.level is not None:
            check_runnable(model)
    log = export_log(options.dump)
    if options.adapters == "merged" or not isinstance(model, GraloraModel):
        traced, adapters = fold_adapters(model), None
    else:
        from gralora_fx.exporters.kinds.data_sites import data_sites

        traced, adapters = base_trace(model), data_sites(model, options, has_blocks=has_blocks)
    plan = None if options.format is None else _plan(options, options.format, traced, base_trace(model), stored=stored)
    return Conversion(model, traced, options, log, adapters, plan)


def _plan(
    options: ExportOptions, form: Format, traced: TracedModel, base: TracedModel, *, stored: bool
) -> QuantizationPlan:
    """Return the plan of a quantized export; integers of the base's checkpoint are kept in blocks."""
    from gralora_fx.exporters.quantize.plan import kept_plan, plan_of_model, with_kept

    if not stored or not isinstance(form, Blocks):
        return plan_of_model(form, traced)
    from gralora_fx.exporters.quantize.kept import StoredLayers

    layers = StoredLayers(base, traced)
    if options.quantize == KEPT:
        return kept_plan(form, layers, options.block_size)
    return with_kept(plan_of_model(form, traced), layers, options.block_size, form.accuracy_level)


def fold_adapters(model: TracedModel | GraloraModel, *, untie: bool = False) -> TracedModel:
    """Return the adapter-free model: the traced model itself, or one with the active adapters merged lazily."""
    if isinstance(model, TracedModel):
        return model
    if not isinstance(model, GraloraModel):
        raise ExportError(
            f"cannot export {an(type(model).__name__)}; {CALL_TRACE} and give what it or rewrite() returned"
        )
    return merge_lazily(model, untie=untie) if model.active_adapters else base_trace(model)


def base_trace(model: TracedModel | GraloraModel) -> TracedModel:
    """Return the trace of the base model, without adapters but with the passes of a rewritten one."""
    return model.without_adapters if isinstance(model, GraloraModel) else model


def is_streamed(model: TracedModel | GraloraModel) -> bool:
    """Return whether a model's weights are read from files when they are needed."""
    parameters = base_trace(model).tree.parameters.values()
    if not any(map(is_lazy, parameters)):
        return False
    from gralora_fx.core.graph.packed_weights import packed_of

    return any(is_lazy(parameter) and packed_of(parameter) is None for parameter in parameters)


def check_runnable(model: TracedModel | GraloraModel) -> None:
    """Check that a model is a traced or rewritten one whose weights have values."""
    if not isinstance(model, (TracedModel, GraloraModel)):
        raise ExportError(f"cannot run {an(type(model).__name__)}; {CALL_TRACE} and give what it or rewrite() returned")
    traced = base_trace(model)
    for name, parameter in traced.tree.parameters.items():
        if parameter.is_meta and not is_lazy(parameter):
            raise without_values(name)


def base_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, shapes, dtypes and a sample of the values of every parameter."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        if tensor.numel():
            sample = sampled_values(parameters[name], name, _SAMPLES).cpu().to(tensor.dtype)
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(model: TracedModel | GraloraModel) -> str:
    """Return the fingerprint of a model's base, without the parameters that its active adapters replace.

    Those do not affect an export, and differ in every run if they are a fresh head's.
    """
    if isinstance(model, TracedModel):
        return base_fingerprint(model.tree.parameters)
    copies = [model.adapter(name).copies for name in model.active_adapters]
    replaced = {base for owners in copies for owned in owners.values() for base in owned}
    parameters = model.traced.tree.parameters
    return base_fingerprint({name: value for name, value in parameters.items() if name not in replaced})
