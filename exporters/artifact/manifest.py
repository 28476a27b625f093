"""The manifest of an export: what its directory holds, and what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gralora_fx.adapters.base_of_adapter import base_of
from gralora_fx.adapters.folded_adapters import describe_folded
from gralora_fx.compat.versions import installed_version
from gralora_fx.exporters.artifact.fingerprint import fingerprint_of
from gralora_fx.exporters.artifact.position_offset import position_offset
from gralora_fx.exporters.folded_model import base_trace
from gralora_fx.exporters.folding.initializer_names import weight_entries
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.adapter_inputs import AdapterInputs, is_adapter_tensor
from gralora_fx.runtime.export_directory import MANIFEST_NAME, PLAIN_KIND, ROWS
from gralora_fx.runtime.manifest import SCHEMA_VERSION, AdapterEntry, BaseEntry, Manifest, RowsEntry, SiteEntry
from gralora_fx.runtime.quantized_weights import QuantizedWeights
from gralora_fx.tracing.traced_model import TracedModel

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def describe(
    model: TracedModel | GraloraModel,
    graphs: Mapping[str, ir.Graph],
    *,
    adapters: str,
    precision: str,
    quantization: QuantizedWeights | None,
    logits: str,
    attention: Mapping[str, Any] | None,
    passes: Iterable[Mapping[str, Any]],
    adapter_inputs: AdapterInputs | None = None,
    rows: RowsEntry | None = None,
    flavour: str = PLAIN_KIND,
) -> Manifest:
    """The manifest of an export, without its files and its verification.

    Args:
        model: What was exported.
        graphs: The ONNX graphs by the names of their files; inputs and outputs of several are told apart by them, but
            for those of `model_rows`, which are left out.
        adapters: How adapters are held.
        precision: Precision of the weights that are not quantized, and of the cache.
        quantization: How matrices are quantized and how many, or None.
        logits: Which positions' logits the graph returns: `"last"` or `"all"`.
        attention: Which layers' attention is fused, or None.
        passes: What every pass did.
        adapter_inputs: The adapter tensors that the graphs take; None where adapters are folded.
        rows: The graph whose rows differ, or why there is none; None where it is not asked for.
        flavour: Kind of export.
    """
    traced = base_trace(model)
    described = {name: graph for name, graph in graphs.items() if name != ROWS}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        task=traced.task,
        precision=precision,
        quantization=quantization,
        adapters_mode=adapters,
        logits=logits,
        position_offset=position_offset(traced),
        adapters=describe_adapters(model) if adapter_inputs is None else {},
        base_fingerprint=fingerprint_of(model),
        sites=tuple(SiteEntry(site.path, site.kind, site.in_features, site.out_features) for site in traced.sites),
        inputs=_by_file({name: _shapes(graph.inputs) for name, graph in described.items()}),
        outputs=_by_file({name: _shapes(graph.outputs) for name, graph in described.items()}),
        packages={name: found for name in ("gralora-fx", *_PACKAGES) if (found := installed_version(name))},
        attention=attention,
        passes=tuple(passes),
        image_sizes=traced.signature.image_sizes,
        adapter_inputs=adapter_inputs,
        weights=weight_entries(traced, graphs),
        base=_base(traced),
        rows=rows,
        flavour=flavour,
    )


def _base(traced: TracedModel) -> BaseEntry | None:
    source = base_of(traced)
    if source.name is None:
        return None
    local = None if source.directory is None else str(source.directory)  # whatever directory later commands run in
    return BaseEntry(source.hub_id or local or source.name, source.commit)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest to its export directory."""
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def describe_adapters(model: TracedModel | GraloraModel) -> dict[str, AdapterEntry]:
    """Configuration and digest by name of each adapter that an export folds or that was merged before."""
    found: Mapping[str, Any] = model.merged_adapters if isinstance(model, TracedModel) else _active(model)
    return {name: AdapterEntry(entry["config"], entry["sha256"], entry.get("base")) for name, entry in found.items()}


def _active(model: GraloraModel) -> Mapping[str, Any]:
    adapters = [model.installed(name) for name in model.active_adapters]
    return describe_folded(adapters, model.traced, own=True)


def _by_file(described: dict[str, Any]) -> dict[str, Any]:
    return described if len(described) > 1 else dict(next(iter(described.values())))


def _shapes(values: Iterable[ir.Value]) -> dict[str, list[int | str | None]]:
    return {str(value.name): _shape(value) for value in values if not is_adapter_tensor(str(value.name))}


def _shape(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
