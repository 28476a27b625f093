"""Models that run beside a model's graph, such as a tower, with the adapters of the rewritten model."""

from __future__ import annotations

from gralora_fx.core.adapters.adapter import ModelAdapter, checkpoint_parameters
from gralora_fx.core.adapters.checkpoint import load_tensors
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel


def companions_of(model: TracedModel | GraloraModel) -> dict[str, TracedModel | GraloraModel]:
    """Return a decoder's companions by their files' names, each with the adapters that change it."""
    if not isinstance(model, GraloraModel):
        return dict(model.companions)
    return {name: with_adapters(part, model) for name, part in model.traced.companions.items()}


def with_adapters(part: TracedModel, model: GraloraModel) -> TracedModel | GraloraModel:
    """Return a companion with its decoder's adapters that change it; the companion itself if none does."""
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
