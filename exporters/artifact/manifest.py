"""An export's manifest, described from its models, and those models saved to files."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from gralora_fx.base.compat.packages import installed_version
from gralora_fx.base.progress.stages import counting
from gralora_fx.base.sources.model_files import RECORD
from gralora_fx.core.adapters.folded_adapters import describe_folded
from gralora_fx.core.graph.sites import other_readers
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.artifact.staging import require_space
from gralora_fx.exporters.kinds.conversion import Conversion, base_trace, fingerprint_of
from gralora_fx.exporters.reports import attention_report
from gralora_fx.exporters.rules.products.initializers import ProductWeight, parameter_names, product_weights
from gralora_fx.format.adapter_inputs import AdapterInputs, is_adapter_tensor
from gralora_fx.format.export_directory import MANIFEST_NAME, ROWS
from gralora_fx.format.manifest import (
    SCHEMA_VERSION,
    AdapterEntry,
    BaseEntry,
    CompanionEntry,
    Manifest,
    RowsEntry,
    SiteEntry,
    WeightEntry,
)
from gralora_fx.format.quantized_weights import QuantizedWeights
from gralora_fx.run.engine.limits import context_length

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def describe(
    conversion: Conversion,
    models: Mapping[str, ir.Model],
    companions: Mapping[str, Conversion],
    programs: Collection[str] = (),
    *,
    flavour: str,
    logits: str,
) -> Manifest:
    """Return the manifest of an export without its files and verification; the mappings are by file name."""
    model, options, log = conversion.model, conversion.options, conversion.log
    traced = base_trace(model)
    graphs = {name: onnx_model.graph for name, onnx_model in models.items()}
    described = {name: graph for name, graph in graphs.items() if name not in (ROWS, *companions, *programs)}
    attention = attention_report(log)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        task=traced.task,
        precision=options.precision,
        quantization=_quantization(conversion),
        adapters_mode=options.adapters,
        logits=logits,
        position_offset=position_offset(traced),
        adapters=describe_adapters(model) if conversion.adapters is None else {},
        base_fingerprint=conversion.fingerprint,
        sites=tuple(_sites(traced, [other.traced for other in companions.values()])),
        inputs=_by_file({name: _shapes(graph.inputs) for name, graph in described.items()}),
        outputs=_by_file({name: _shapes(graph.outputs) for name, graph in described.items()}),
        packages={name: found for name in ("gralora-fx", *_PACKAGES) if (found := installed_version(name))},
        attention=None if attention is None else dataclasses.asdict(attention),
        passes=tuple(entry.to_dict() for entry in log.reports),
        facts=traced.signature.facts,
        limits=traced.signature.limits,
        adapter_inputs=_adapter_inputs(conversion, companions.values()),
        weights=weight_entries(traced, graphs),
        base=_base(traced),
        rows=next(iter(log.summaries(RowsEntry)), None),
        flavour=flavour,
        companions={
            name: CompanionEntry(**_ends(graphs[name]), quantization=_quantization(other))
            for name, other in companions.items()
        },
        programs={name: _ends(graphs[name]) for name in programs},
    )


def _adapter_inputs(conversion: Conversion, companions: Iterable[Conversion]) -> AdapterInputs | None:
    """Return the adapter tensors that a decoder and its companions take; None if adapters are folded."""
    if conversion.adapters is None:
        return None
    own = conversion.adapters.inputs
    others = [other.adapters.inputs for other in companions if other.adapters is not None]
    sites = (*own.sites, *(site for inputs in others for site in inputs.sites))
    called = {site.path for site in sites}
    return dataclasses.replace(own, sites=sites, uncalled=tuple(path for path in own.uncalled if path not in called))


def _sites(traced: TracedModel, companions: Iterable[TracedModel]) -> Iterator[SiteEntry]:
    readers = other_readers(traced.graph_module, traced.sites)
    beside = {site.path for other in companions for site in other.sites if site.calls}
    for site in traced.sites:
        is_read = bool(site.calls or readers[site.path]) or site.path in traced.out_of_reach or site.path in beside
        is_layer = site.path in traced.tree.linear
        yield SiteEntry(site.path, site.kind, site.in_features, site.out_features, is_read, is_layer)


def _base(traced: TracedModel) -> BaseEntry | None:
    if traced.config is None or traced.tokenizer_source is None:  # made in memory
        return None
    from gralora_fx.core.adapters.base import base_of

    source = base_of(traced)
    assert source.name is not None
    local = None if source.directory is None else str(source.directory)  # whatever directory later commands run in
    return BaseEntry(source.hub_id or local or source.name, source.commit, getattr(traced.config, RECORD, None))


def _quantization(conversion: Conversion) -> QuantizedWeights | None:
    """Return the record of how weights are quantized; None for floats."""
    if conversion.plan is None:
        return None
    from gralora_fx.exporters.quantize.plan import quantized_weights

    return quantized_weights(conversion.plan, conversion.log, conversion.options.precision)


def weight_entries(traced: TracedModel, graphs: Mapping[str, ir.Graph]) -> dict[str, tuple[WeightEntry, ...]]:
    """Return where the weight of each linear layer lies, by the layer's path."""
    names = {site.path: {f"{site.path}.weight", *traced.tree.names_of(site.weight)} for site in traced.sites}
    sites: dict[str, list[str]] = {}
    for path, of_site in names.items():
        for name in of_site:
            sites.setdefault(name, []).append(path)
    widths = {site.path: site.out_features for site in traced.sites}
    entries: dict[str, list[WeightEntry]] = {}
    for file, graph in graphs.items():
        for weight in product_weights(graph):
            start = 0
            for part in _parameters_of(weight, sites, widths):
                stop = start + widths[sites[part][0]]
                entry = WeightEntry(f"{file}.onnx", weight.name, start, stop, weight.transposed)
                for path in sites[part]:
                    entries.setdefault(path, []).append(entry)
                start = stop
    return {path: tuple(of_layer) for path, of_layer in entries.items()}


def _parameters_of(weight: ProductWeight, sites: Mapping[str, list[str]], widths: Mapping[str, int]) -> tuple[str, ...]:
    """Return the parameters that an initializer holds; none unless all are weights of layers."""
    for names in parameter_names(weight.value):
        is_known = all(name in sites for name in names)
        if is_known and sum(widths[sites[name][0]] for name in names) == weight.out_features:
            return names
    return ()


def describes(manifest: Manifest, model: TracedModel | GraloraModel) -> bool:
    """Return whether a manifest describes a model, by the base's fingerprint and the adapters' digests."""
    if manifest.base_fingerprint not in (None, fingerprint_of(model)):
        return False
    return manifest.adapter_inputs is not None or digests_of(manifest.adapters) == digests_of(describe_adapters(model))


def digests_of(entries: Mapping[str, AdapterEntry]) -> list[str]:
    """Return the digests of adapters, sorted."""
    return sorted(str(entry.sha256) for entry in entries.values())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest to its export directory."""
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def made_from(conversion: Conversion) -> dict[str, Any]:
    """Return what the results of an export depend on, as JSON takes it."""
    options = dataclasses.asdict(dataclasses.replace(conversion.options, tokenizer=None, dump=None))
    adapters = {name: dataclasses.asdict(entry) for name, entry in describe_adapters(conversion.model).items()}
    packages = {name: installed_version(name) for name in ("gralora-fx", *_PACKAGES)}
    return {"base": conversion.fingerprint, "adapters": adapters, "options": options, "packages": packages}


def describe_adapters(model: TracedModel | GraloraModel) -> dict[str, AdapterEntry]:
    """Return configuration and digest of each adapter that an export folds or that was merged before, by name."""
    found: Mapping[str, Any] = model.merged_adapters if isinstance(model, TracedModel) else _active(model)
    return {name: AdapterEntry(entry["config"], entry["sha256"], entry.get("base")) for name, entry in found.items()}


def _active(model: GraloraModel) -> Mapping[str, Any]:
    adapters = [model.adapter(name) for name in model.active_adapters]
    return describe_folded(adapters, model.traced, own=True)


def _by_file(described: dict[str, Any]) -> dict[str, Any]:
    return described if len(described) > 1 else dict(next(iter(described.values())))


def _ends(graph: ir.Graph) -> dict[str, Any]:
    return {"inputs": _shapes(graph.inputs), "outputs": _shapes(graph.outputs)}


def _shapes(values: Iterable[ir.Value]) -> dict[str, list[int | str | None]]:
    return {str(value.name): _shape(value) for value in values if not is_adapter_tensor(str(value.name))}


def _shape(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def position_offset(traced: TracedModel) -> int:
    """Return the number of unused rows before the position table: RoBERTa counts from its padding index + 1."""
    limit = context_length(traced.config.to_dict()) if traced.config is not None else None
    parameters = dict(traced.graph_module.named_parameters(remove_duplicate=False))
    for node in traced.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table = node.args[0]
        name = str(table.target) if isinstance(table, torch.fx.Node) and table.op == "get_attr" else ""
        padding = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
        if "position" in name and name in parameters and parameters[name].shape[0] == limit and padding >= 0:
            return int(padding) + 1
    return 0


_WRITERS, _IN_FLIGHT = 2, 2**28  # threads that write weights, and the most bytes they hold at once
_INLINE = 1024  # bytes of the largest tensor that is written into the model itself


def save_models(
    onnx_models: Mapping[str, ir.Model], stage: Path, output_dir: str | Path, *, shared: bool = False
) -> None:
    """Write models, if there is room for them."""
    tensors = [tensor for model in onnx_models.values() for _, tensor in _weights(model)]
    if shared:
        tensors = list({_identity(tensor): tensor for tensor in tensors}.values())
    require_space(output_dir, sum(tensor.nbytes for tensor in tensors))
    written: dict[Hashable, ir.ExternalTensor] = {}
    for name, model in onnx_models.items():
        _save(model, stage, name, written)
        if not shared:
            written.clear()


def _save(model: ir.Model, stage: Path, name: str, written: dict[Hashable, ir.ExternalTensor]) -> None:
    """Write a model with those weights that are not yet written, and record them; the model itself is not changed."""
    weights = list(_weights(model))
    identities = {id(tensor): _identity(tensor) for _, tensor in weights if tensor.nbytes > _INLINE}
    try:
        for value, tensor in weights:
            if identities.get(id(tensor)) in written:
                value.const_value = None  # the writer skips it
        if not written or any(value.const_value is not None and id(tensor) in identities for value, tensor in weights):
            new = sum(value.const_value is not None and id(tensor) in identities for value, tensor in weights)
            done = itertools.count(1)
            with counting("writing weights", new, "tensors") as count:
                ir.external_data.unload_from_model(
                    model,
                    stage,
                    f"{name}.onnx_data",
                    size_threshold_bytes=_INLINE,
                    callback=lambda *_: count(next(done)),
                    max_workers=_WRITERS,
                    max_in_flight_bytes=_IN_FLIGHT,
                )
        for value, tensor in weights:
            identity = identities.get(id(tensor))
            if value.const_value is None:
                value.const_value = written[identity]
            elif isinstance(value.const_value, ir.ExternalTensor):
                written[identity] = value.const_value
        ir.save(model, stage / f"{name}.onnx")
    finally:
        for value, tensor in weights:
            value.const_value = tensor


def _weights(model: ir.Model) -> Iterable[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield the initializers of a model with their tensors, branches included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value


def _identity(tensor: ir.TensorProtocol) -> Hashable:
    """Return a key that is equal for one tensor: the object, or the values of a constant that a pass created."""
    if type(tensor) is ir.Tensor:
        return tensor.dtype, tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest()
    return id(tensor)
