"""`rewrite`: linear call sites become subgraphs with adapters."""

from __future__ import annotations

from gralora_fx.config import AdapterConfig
from gralora_fx.errors import RewriteError
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.planning.rewrite_plan import RewritePlan
from gralora_fx.tracing.traced_model import TracedModel, check_traced


def rewrite(
    traced: TracedModel, config_or_plan: AdapterConfig | RewritePlan, *, adapter_name: str = "default"
) -> GraloraModel:
    """Substitute the targeted linear call sites of a traced model with subgraphs that hold adapters.

    The traced model keeps its graph; the result has a copy of it over the same parameters, which stop requiring
    gradients.

    Args:
        traced: A traced model.
        config_or_plan: What to adapt, or a plan made from that.
        adapter_name: Name of the adapter.

    Returns:
        The rewritten model, its adapter active, in the mode of `traced`.

    Raises:
        TargetError: The configuration does not fit the model.
        ConfigError: The adapter's name is invalid.
        RewriteError: The plan is for another graph. `traced` is unchanged after an error.
    """
    check_traced(traced, RewriteError, "rewrite")
    model = GraloraModel(traced)
    model.add_adapter(adapter_name, config_or_plan)
    model.freeze_base()
    return model
