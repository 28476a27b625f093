"""The layers of a model whose adapters are data of its export."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from gralora_fx.core.config import GraloraConfig
from gralora_fx.core.graph.linear_calls import calls_at
from gralora_fx.core.graph.module_tree import innermost_path
from gralora_fx.core.graph.sites import LinearSite, ParameterSite
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.planning.rewrite_plan import PlannedSite
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, listed, option
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.format.adapter_inputs import BIAS, BLOCKS, WHOLE, AdapterInputs, AdapterSite

_WEIGHT, _BIAS = ".weight", ".bias"
_SMALL = 16  # the rank of an adapter as plain LoRA, up to which its values take no longer than the nodes of blocks
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class DataSites:
    """The layers of a model whose adapters are data of its export."""

    inputs: AdapterInputs  # the tensors that the export takes
    # by each name of a weight: the layer that multiplies by it in a module, by the module's path; None without adapters
    weights: Mapping[str, Mapping[str, str | None]]
    norm_biases: Mapping[str, str]  # paths of the normalizations whose bias trains, by each name of the bias


def takes_blocks(model: GraloraModel, *, is_quantized: bool) -> bool:
    """Return whether an export takes adapters with GraLoRA's blocks, rather than each as an equivalent plain LoRA.

    LoRA's form has a third of the nodes and `gralora_k` times the values. Blocks are faster, except for a small adapter
    over quantized weights (see `python -m benchmarks forms`). Adapters with different `gralora_k` cannot share blocks.
    """
    if len(_block_counts(model)) != 1:
        return False
    return not is_quantized or max(planned.k * planned.r for planned in _with_blocks(model)) > _SMALL


def data_sites(model: GraloraModel, options: ExportOptions, *, has_blocks: bool | None = None) -> DataSites:
    """Return the layers that any adapter of a model changes, active or not, with blocks where these are faster."""
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
    if has_blocks is None:
        has_blocks = takes_blocks(model, is_quantized=is_quantized)
    k = next(iter(_block_counts(model)), 0) if has_blocks else 0
    _check_widths(planned, k or 1)
    blocks = {entry.site.path for entry in planned}
    owned = [model.adapter(name) for name in model.configs]
    scaled = {path for own in owned if options.dora or own.method.scales_rows for path in own.planned}
    sites = [site for site in model.sites if site.path in blocks or trained & _parameters_of(site)]
    called = [site for site in sites if site.calls]
    entries = [_entry(site, blocks, trained, scaled) for site in called]
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
            f"no adapter can be data at {layers}: their weights are computed in the graph, used within a branch or a "
            "loop, or shared with a layer that computes the same; leave these layers out (exclude_modules), and out of "
            "modules_to_save"
        )
    if biases:
        reasons.append(
            f"no trained bias can be data at {biases}: not a linear layer or a layer normalization outside of "
            "branches and loops; leave it untrained (bias='none', or the adapted layers' alone)"
        )
    if reasons:
        raise ExportError(f"{'; '.join(reasons)}; or export with {option(adapters='merged')}")


def _trained(model: GraloraModel) -> set[str]:
    """Return the names of parameters that adapters train as copies (`modules_to_save`, biases)."""
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
    """Return the names of a layer's parameters."""
    return {f"{site.path}{_WEIGHT}", *([] if site.bias is None else [f"{site.path}{_BIAS}"])}


def _entry(site: LinearSite, blocks: Container[str], trained: Container[str], scaled: Container[str]) -> AdapterSite:
    form = WHOLE if f"{site.path}{_WEIGHT}" in trained else BLOCKS if site.path in blocks else BIAS
    has_bias = f"{site.path}{_BIAS}" in trained
    return AdapterSite(site.path, site.in_features, site.out_features, form, has_bias, site.path in scaled)


def _norm_entry(traced: TracedModel, bias: str) -> AdapterSite:
    """Return the site of a normalization whose bias trains; its input and output widths are equal."""
    (width,) = traced.tree.parameters[bias].shape
    return AdapterSite(bias.removesuffix(_BIAS), width, width, BIAS, has_bias=True)


def _block_counts(model: GraloraModel) -> set[int]:
    """Return the `gralora_k` of the adapters that have blocks, at any site."""
    return {planned.k for planned in _with_blocks(model)}


def _with_blocks(model: GraloraModel) -> list[PlannedSite]:
    """Return the planned sites of a model's GraLoRA adapters."""
    plans = [plan for plan in model.plans.values() if isinstance(plan.config, GraloraConfig)]
    return [planned for plan in plans for planned in plan.selected]


def _check_widths(planned: Iterable[PlannedSite], k: int) -> None:
    wrong = [p.site.path for p in planned if p.site.in_features % k or p.site.out_features % k]
    if wrong:
        raise ExportError(
            f"gralora_k={k} does not divide the widths of {listed(sorted(set(wrong)))}, which another adapter of the "
            "model adapts; export the adapters apart"
        )


def _names_of_weights(sites: Iterable[LinearSite], traced: TracedModel) -> dict[str, dict[str, str | None]]:
    nodes = {node.name: node for node in traced.graph_module.graph.nodes}
    adapted = {site.path for site in sites}
    names: dict[str, dict[str, str | None]] = {}
    for site in sites:
        tied = [other for other in traced.sites if other.weight is site.weight]
        calls = [(call, each.path) for each in tied for name in each.calls for call in calls_at(nodes[name], each.path)]
        keys = [{("module", innermost_path(call.node)), (call.input, call.added)} for call, _ in calls]
        by_module: dict[str, str | None] = {}
        for (call, path), own in zip(calls, keys, strict=True):
            # layers cannot be told apart that multiply in one module, or compute the same
            rivals = {rival for (_, rival), other in zip(calls, keys, strict=True) if own & other}
            by_module[innermost_path(call.node) or ""] = path if path in adapted and rivals == {path} else None
        names |= dict.fromkeys(traced.tree.names_of(site.weight), by_module)
    return names


def _names_of_biases(norms: Iterable[AdapterSite], traced: TracedModel) -> dict[str, str]:
    biases = {norm.path: traced.tree.parameters[f"{norm.path}{_BIAS}"] for norm in norms}
    return {name: path for path, bias in biases.items() for name in traced.tree.names_of(bias)}
