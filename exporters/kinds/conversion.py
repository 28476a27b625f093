"""What an export converts: a trace without adapters, the options, and the layers whose adapters stay data."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from gralora_fx.base.sources.lazy_tensors import sampled_values
from gralora_fx.core.config import GraloraConfig
from gralora_fx.core.graph.pipeline import PassLog
from gralora_fx.core.graph.sites import LinearSite, ParameterSite
from gralora_fx.core.methods import method_of
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.model.rewrite import merge_lazily
from gralora_fx.core.planning.rewrite_plan import PlannedSite
from gralora_fx.core.tracing.traced_model import CALL_TRACE, TracedModel
from gralora_fx.errors import ExportError, command, listed, option
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.rules.onnx_pipeline import export_log
from gralora_fx.format.adapter_inputs import BIAS, BLOCKS, WHOLE, AdapterInputs, AdapterSite

if TYPE_CHECKING:
    from gralora_fx.exporters.quantize.plan import QuantizationPlan

_SAMPLES = 64  # of a parameter, for the fingerprint
_WEIGHT, _BIAS = ".weight", ".bias"
_SMALL = 16  # the rank of an adapter as plain LoRA, up to which its values take no longer than the nodes of blocks
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Conversion:
    """What is converted, and how; each kind of export makes its ONNX models from it.

    Attributes:
        model: What is exported.
        traced: Its trace, the active adapters folded into the weights, or all adapters left out where they are data.
        options: The options of the export.
        log: Receives a report for each pass.
        adapters: The layers whose adapters are data of the ONNX models; None where adapters are folded.
        plan: How matrices are stored; None for floats.
    """

    model: TracedModel | GraloraModel
    traced: TracedModel
    options: ExportOptions
    log: PassLog
    adapters: DataSites | None = None
    plan: QuantizationPlan | None = None

    @property
    def data_adapters(self) -> tuple[str, ...]:
        """Names of the active adapters, where they become data."""
        model = self.model
        return tuple(model.active_adapters) if isinstance(model, GraloraModel) and self.adapters is not None else ()

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the model's base (see `fingerprint_of`)."""
        return fingerprint_of(self.model)

    def by_row(self, log: PassLog) -> Conversion:
        """The conversion to a graph in which each row of a batch has an adapter of its own."""
        adapters = self.adapters
        if adapters is not None:
            adapters = dataclasses.replace(adapters, inputs=adapters.inputs.by_row())
        return dataclasses.replace(self, log=log, adapters=adapters)


def conversion_of(model: TracedModel | GraloraModel, options: ExportOptions) -> Conversion:
    """What an export of a model converts."""
    if isinstance(model, (TracedModel, GraloraModel)):
        configs = model.configs if isinstance(model, GraloraModel) else {}
        methods = {name: method_of(config) for name, config in configs.items()}
        options.check_model(methods=methods, task=base_trace(model).task)
        if options.level is not None:
            check_runnable(model)
    log = export_log(options.dump)
    if options.adapters == "merged" or not isinstance(model, GraloraModel):
        traced, adapters = fold_adapters(model), None
    else:
        traced, adapters = model.traced, data_sites(model, options)
    plan = None
    if options.format is not None:
        from gralora_fx.exporters.quantize.plan import plan_of_model

        plan = plan_of_model(options.format, traced)
    return Conversion(model, traced, options, log, adapters, plan)


def fold_adapters(model: TracedModel | GraloraModel) -> TracedModel:
    """The adapter-free model: the traced model itself, or a rewritten one with its active adapters folded lazily."""
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
    """Check that a model is a traced or rewritten one whose weights are in memory."""
    if not isinstance(model, (TracedModel, GraloraModel)):
        raise ExportError(f"cannot run a {type(model).__name__}; {CALL_TRACE} and give what it or rewrite() returned")
    traced = base_trace(model)
    missing = [name for name, parameter in traced.tree.parameters.items() if parameter.is_meta]
    if missing:
        from gralora_fx.core.graph.packed_weights import packed_of

        missing = [name for name in missing if packed_of(traced.tree.parameters[name]) is None]
    if missing:
        raise ExportError(
            f"{missing[0]} has no values in memory, so there is nothing to compare with; export a streamed model with "
            f"{option(verify=False)}, and compare the export with the model loaded whole ({command('verify_onnx')})"
        )


@dataclass(frozen=True)
class DataSites:
    """The layers of a model whose adapters are data of its export.

    Attributes:
        inputs: The tensors that the export takes.
        weights: Paths of the layers that a weight belongs to, by each name of the weight.
        norm_biases: Paths of the normalizations whose bias trains, by each name of the bias.
    """

    inputs: AdapterInputs
    weights: Mapping[str, tuple[str, ...]]
    norm_biases: Mapping[str, str]


def takes_blocks(model: GraloraModel, *, is_quantized: bool) -> bool:
    """Whether an export takes adapters with GraLoRA's blocks, rather than each as the plain LoRA that it equals.

    LoRA's form has a third of the nodes at a layer and `gralora_k` times the values, and takes any `gralora_k`. Blocks
    win, but for a small adapter over quantized weights, beside which nodes take longer than values; `python -m
    benchmarks forms` measures both. Adapters with different `gralora_k` have no blocks in common.
    """
    if len(_block_counts(model)) != 1:
        return False
    return not is_quantized or max(planned.k * planned.r for planned in _with_blocks(model)) > _SMALL


def data_sites(model: GraloraModel, options: ExportOptions) -> DataSites:
    """The layers that any adapter of a model changes, active or not."""
    mode, is_quantized = options.adapters, options.quantize is not None
    if model.merged_adapters:
        raise ExportError(
            f"{option(adapters=mode)} exports the base, but {', '.join(map(repr, model.merged_adapters))} is merged "
            "into its weights; call unmerge_adapter() first"
        )
    if parameters := [entry.site.path for entry in model.adapted_sites() if isinstance(entry.site, ParameterSite)]:
        raise ExportError(
            f"{option(adapters=mode)} is for linear layers, not for parameters of the model's own code, such as "
            f"stacked matrices, where a row cannot have its own adapter: {listed(parameters, 2)}; give "
            f"{option(adapters='merged')}"
        )
    trained = _trained(model)
    planned = [entry for entry in model.adapted_sites() if f"{entry.site.path}{_WEIGHT}" not in trained]
    k = next(iter(_block_counts(model))) if takes_blocks(model, is_quantized=is_quantized) else 0
    _check_widths(planned, k or 1)
    blocks = {entry.site.path for entry in planned}
    sites = [site for site in model.sites if site.path in blocks or trained & _parameters_of(site)]
    called = [site for site in sites if site.calls]
    entries = [_entry(site, blocks, trained) for site in called]
    of_sites = {parameter for site in sites for parameter in _parameters_of(site)}
    norms = [_norm_entry(model.traced, bias) for bias in sorted(trained - of_sites)]
    uncalled = tuple(site.path for site in sites if not site.calls)
    inputs = AdapterInputs(mode, k, _DTYPES[options.precision], (*entries, *norms), uncalled)
    return DataSites(inputs, _names_of_weights(called, model.traced), _names_of_biases(norms, model.traced))


def check_found(adapters: DataSites, found: Iterable[frozenset[str]]) -> None:
    """Check that the output of every layer was found in the exported graphs."""
    known = frozenset().union(*found)
    missing = [site for site in adapters.inputs.sites if site.path not in known]
    layers, biases = (
        listed(sorted(site.path for site in missing if (site.form == BIAS) == alone)) for alone in (False, True)
    )
    reasons = []
    if layers:
        reasons.append(
            f"no adapter can be data at {layers}: their weights are computed in the graph, or used within a branch or "
            "a loop; leave these layers out (exclude_modules), and out of modules_to_save"
        )
    if biases:
        reasons.append(
            f"no trained bias can be data at {biases}: not a linear layer or a layer normalization outside of "
            "branches and loops; leave it untrained (bias='none', or the adapted layers' alone)"
        )
    if reasons:
        raise ExportError(f"{'; '.join(reasons)}; or export with {option(adapters='merged')}")


def _trained(model: GraloraModel) -> set[str]:
    """Names of the parameters that adapters train as copies of their own (`modules_to_save`, biases)."""
    names = {name: [base for owned in model.adapter(name).copies.values() for base in owned] for name in model.configs}
    known = {parameter for site in model.sites for parameter in _parameters_of(site)}
    known |= {name for name, value in model.traced.tree.parameters.items() if name.endswith(_BIAS) and value.ndim == 1}
    for name, trained in names.items():
        if others := sorted(set(trained) - known):
            raise ExportError(
                f"adapter {name!r} trains {listed(others, 3)} (modules_to_save or bias), and only linear layers and "
                f"biases can be data; export it with {option(adapters='merged')}, or train it without these"
            )
    return {base for trained in names.values() for base in trained}


def _parameters_of(site: LinearSite) -> set[str]:
    """Names of a layer's parameters."""
    return {f"{site.path}{_WEIGHT}", *([] if site.bias is None else [f"{site.path}{_BIAS}"])}


def _entry(site: LinearSite, blocks: Container[str], trained: Container[str]) -> AdapterSite:
    form = WHOLE if f"{site.path}{_WEIGHT}" in trained else BLOCKS if site.path in blocks else BIAS
    has_bias = f"{site.path}{_BIAS}" in trained
    return AdapterSite(site.path, site.in_features, site.out_features, form, has_bias)


def _norm_entry(traced: TracedModel, bias: str) -> AdapterSite:
    """A normalization whose bias trains; the widths before and after it are equal."""
    (width,) = traced.tree.parameters[bias].shape
    return AdapterSite(bias.removesuffix(_BIAS), width, width, BIAS, has_bias=True)


def _block_counts(model: GraloraModel) -> set[int]:
    """The `gralora_k` of the adapters that have blocks, at any site."""
    return {planned.k for planned in _with_blocks(model)}


def _with_blocks(model: GraloraModel) -> list[PlannedSite]:
    """What the GraLoRA adapters of a model do at each of their layers."""
    plans = [plan for plan in model.plans.values() if isinstance(plan.config, GraloraConfig)]
    return [planned for plan in plans for planned in plan.selected]


def _check_widths(planned: Iterable[PlannedSite], k: int) -> None:
    wrong = [p.site.path for p in planned if p.site.in_features % k or p.site.out_features % k]
    if wrong:
        raise ExportError(
            f"gralora_k={k} does not divide the widths of {listed(sorted(set(wrong)))}, which another adapter of the "
            "model adapts; export the adapters apart"
        )


def _names_of_weights(sites: Iterable[LinearSite], traced: TracedModel) -> dict[str, tuple[str, ...]]:
    paths: dict[str, tuple[str, ...]] = {}
    for site in sites:
        for name in traced.tree.names_of(site.weight):
            paths[name] = (*paths.get(name, ()), site.path)
    return paths


def _names_of_biases(norms: Iterable[AdapterSite], traced: TracedModel) -> dict[str, str]:
    biases = {norm.path: traced.tree.parameters[f"{norm.path}{_BIAS}"] for norm in norms}
    return {name: path for path, bias in biases.items() for name in traced.tree.names_of(bias)}


def base_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and a sample of the values of every parameter."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        if tensor.numel():
            sample = sampled_values(parameters[name], name, _SAMPLES).cpu().to(tensor.dtype)
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(model: TracedModel | GraloraModel) -> str:
    """The fingerprint of a model's base, without the parameters that its active adapters hold copies of.

    What a copy replaces has no meaning for an export, and differs in every run where it is a fresh head.
    """
    if isinstance(model, TracedModel):
        return base_fingerprint(model.tree.parameters)
    copies = [model.adapter(name).copies for name in model.active_adapters]
    replaced = {base for owners in copies for owned in owners.values() for base in owned}
    parameters = model.traced.tree.parameters
    return base_fingerprint({name: value for name, value in parameters.items() if name not in replaced})
