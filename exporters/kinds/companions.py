"""What a decoder's model runs beside it, such as what reads pixels: ONNX models of their own in the same directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from gralora_fx.core.adapters.adapter import ModelAdapter, checkpoint_parameters
from gralora_fx.core.adapters.checkpoint import load_tensors
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import Conversion, base_trace, conversion_of
from gralora_fx.exporters.kinds.data_sites import check_found
from gralora_fx.exporters.kinds.plain import plain_models
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.rules.adapters.site_marks import MarkedSites
from gralora_fx.format.export_directory import MODEL


def companions_of(model: TracedModel | GraloraModel) -> dict[str, TracedModel | GraloraModel]:
    """Return a decoder's companions by the names of their files, each with the adapters that change it."""
    traced = base_trace(model)
    if not isinstance(model, GraloraModel):
        return dict(traced.companions)
    return {name: with_adapters(part, model) for name, part in traced.companions.items()}


def with_adapters(part: TracedModel, model: GraloraModel) -> TracedModel | GraloraModel:
    """Return a companion with the adapters of its decoder that change it; itself if there is none."""
    adapted = GraloraModel(part)
    for name, config in model.configs.items():
        adapter = model.adapter(name)
        if not _changes(adapter, part):
            continue
        adapted.add_adapter(name, config)
        load_tensors(adapted.adapter(name), checkpoint_parameters(adapter), part.tree, f"adapter {name!r}")
    if not adapted.configs:
        return part
    adapted.set_adapter([name for name in model.active_adapters if name in adapted.configs])
    return adapted.train(model.training)


def _changes(adapter: ModelAdapter, part: TracedModel) -> bool:
    """Return whether an adapter changes a layer that a companion calls, or a parameter that it reads."""
    called = {site.path for site in part.adaptable if site.calls}
    if any(planned.site.path in called for planned in adapter.plan.selected):
        return True
    read = dict(part.graph_module.named_parameters(remove_duplicate=False))
    return any(base in read for owned in adapter.copies.values() for base in owned)


def companion_conversions(model: TracedModel | GraloraModel, options: ExportOptions) -> dict[str, Conversion]:
    """Return what is converted of each companion; its weights stay floats, whatever the decoder's become."""
    own = dataclasses.replace(
        options,
        quantize=None,
        bits=None,
        block_size=None,
        accuracy_level=None,
        logits="last",
        tokenizer=None,
        texts=None,
        dump=None,
    )
    found: dict[str, Conversion] = {}
    for name, part in companions_of(model).items():
        is_adapted = isinstance(part, GraloraModel)
        found[name] = conversion_of(part, own if is_adapted else dataclasses.replace(own, adapters="merged"))
    return found


def companion_models(conversions: Mapping[str, Conversion]) -> dict[str, ir.Model]:
    """Return the ONNX models of companions, by the names of their files."""
    models: dict[str, ir.Model] = {}
    for name, conversion in conversions.items():
        models[name] = plain_models(conversion)[MODEL]
        if conversion.adapters is not None:
            check_found(conversion.adapters, (found.paths for found in conversion.log.summaries(MarkedSites)))
    return models
