"""`gralora_export.json`: what an export directory holds, and what it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gralora_fx.adapters.folded_adapters import describe_folded
from gralora_fx.exporters.artifact.fingerprint import fingerprint_of
from gralora_fx.exporters.artifact.position_offset import position_offset
from gralora_fx.exporters.folded_model import base_of
from gralora_fx.exporters.reports import VerifyReport
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.manifest import SCHEMA_VERSION
from gralora_fx.runtime.names import MANIFEST_NAME
from gralora_fx.tracing.traced_model import TracedModel

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def describe(
    model: TracedModel | GraloraModel,
    graphs: Mapping[str, ir.Graph],
    *,
    adapters: str,
    precision: str,
    quantization: Mapping[str, Any] | None,
    logits: str,
) -> dict[str, Any]:
    """The manifest of an export, without its verification.

    Args:
        model: What was exported.
        graphs: The ONNX graphs by the names of their files; inputs and outputs of several are told apart by them.
        adapters: How adapters are held: `"merged"`.
        precision: Precision of the weights that are not quantized, and of the cache.
        quantization: How matrices are quantized and how many, or None.
        logits: Which positions' logits the graph gives: `"last"` or `"all"`.
    """
    traced = base_of(model)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": traced.task,
        "precision": precision,
        "quantization": None if quantization is None else dict(quantization),
        "adapters_mode": adapters,
        "logits": logits,
        "position_offset": position_offset(traced),
        "adapters": describe_adapters(model),
        "base_fingerprint": fingerprint_of(model),
        "sites": [
            {
                "path": site.path,
                "kind": site.kind,
                "in_features": site.in_features,
                "out_features": site.out_features,
            }
            for site in traced.sites
        ],
        "inputs": _by_file({name: _shapes(graph.inputs) for name, graph in graphs.items()}),
        "outputs": _by_file({name: _shapes(graph.outputs) for name, graph in graphs.items()}),
        "packages": {name: version(name) for name in ("gralora-fx", *_PACKAGES)},
    }


def write_manifest(directory: Path, manifest: Mapping[str, Any], verification: VerifyReport | None) -> None:
    """Write a manifest with what verification found."""
    found = None if verification is None else verification.to_dict()
    text = json.dumps({**manifest, "verification": found}, indent=2, sort_keys=True)
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def describe_adapters(model: TracedModel | GraloraModel) -> dict[str, Any]:
    """Configuration and digest of each adapter that an export of a model folds, or that was merged before, by name."""
    if isinstance(model, TracedModel):
        return dict(model.merged_adapters)
    adapters = [model.installed(name) for name in model.active_adapters]
    return dict(describe_folded(adapters, model.traced, own=True))


def _by_file(found: dict[str, Any]) -> dict[str, Any]:
    return found if len(found) > 1 else dict(next(iter(found.values())))


def _shapes(values: Iterable[ir.Value]) -> dict[str, list[int | str | None]]:
    return {str(value.name): _shape(value) for value in values}


def _shape(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
