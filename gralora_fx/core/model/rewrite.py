"""`rewrite`: inserts adapters at linear call sites; `merge`: returns the model without them, with folded weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from gralora_fx.core.adapters.adapter import adapter_names as as_names
from gralora_fx.core.adapters.folded_adapters import describe_folded
from gralora_fx.core.adapters.folded_weights import SiteUpdate, folded_weights, lazy_weights
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.graph.surgery import replace_parameters
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.model.merging import replace_weights
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.tracing.normalize.modes import trained_buffers
from gralora_fx.core.tracing.traced_model import CALL_TRACE, TracedModel, check_traced
from gralora_fx.errors import MergeError, RewriteError, an, remedy


def rewrite(
    traced: TracedModel, config_or_plan: AdapterConfig | RewritePlan, *, adapter_name: str = "default"
) -> GraloraModel:
    """Substitute the targeted linear call sites of a traced model with subgraphs that hold adapters.

    The traced model keeps its graph; the result has a copy of it over the same parameters, which stop requiring
    gradients.

    Args:
        traced: A traced model.
        config_or_plan: The configuration of the adapter, or a plan made from it.
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


def merge(
    model: GraloraModel, adapter_names: Sequence[str] | str | None = None, *, safe: bool = True, untie: bool = False
) -> TracedModel:
    """Return the base model with adapters folded into its weights, and with the model's own passes.

    The model and the base's weights stay unchanged; the folded weights are new, and buffers that training updates are
    copies. Updates are accumulated in float32
    or better and rounded once.

    Args:
        model: A rewritten model.
        adapter_names: Names of the adapters to fold; None for the active ones.
        safe: Whether to check that every folded weight is finite.
        untie: Whether a layer with a tied weight gets one of its own in the result, instead of being refused.

    Returns:
        A traced model in the mode of `model`, which records the adapters (`merged_adapters`).

    Raises:
        RewriteError: An adapter does not exist, or two of them cannot be combined (see `set_adapter`).
            Or a pass fails over the merged graph, or an edit of the graph was not adopted (`adopt_edits`).
        MergeError: There is nothing to fold, a weight is tied to another layer, or would not be finite.
    """
    names, work = _work(model, adapter_names)
    weights = folded_weights(model.traced.graph_module, work, safe=safe, untie=untie)
    described = describe_folded([model.adapter(name) for name in names], model.traced, own=False)
    merged = dataclasses.replace(_merged(model, names, weights), merged_adapters=described)
    own: dict[Tensor, Tensor] = {}  # training either model leaves the other as it is
    buffers = trained_buffers(merged.graph_module).items()
    copies = {name: own.setdefault(buffer, buffer.clone()) for name, buffer in buffers}
    replace_parameters(merged.graph_module, copies, "_buffers")
    return merged


def merge_lazily(
    model: GraloraModel, adapter_names: Sequence[str] | str | None = None, *, untie: bool = False
) -> TracedModel:
    """Merge like `merge`, with lazy weights on the meta device, each computed and checked to be finite when read.

    So a whole model is folded and written with the memory of one weight; it cannot be run.
    """
    names, work = _work(model, adapter_names)
    return _merged(model, names, lazy_weights(model.traced.graph_module, work, untie=untie), shares=True)


def _work(model: GraloraModel, adapter_names: Sequence[str] | str | None) -> tuple[list[str], list[SiteUpdate]]:
    """Return the names of the adapters to fold and their updates."""
    if not isinstance(model, GraloraModel):
        first = "" if isinstance(model, TracedModel) else f"{CALL_TRACE} then rewrite(), and "
        raise MergeError(
            f"cannot merge {an(type(model).__name__)}; {first}give {remedy('what rewrite() returned', '--adapter')}"
        )
    names = list(model.active_adapters) if adapter_names is None else as_names(adapter_names)
    if twice := [name for name in names if names.count(name) > 1]:
        raise MergeError(f"adapter {twice[0]!r} is named twice, and would be folded twice; name it once")
    work = model.updates(names)
    if not work:
        raise MergeError("no adapter is active, so there is nothing to merge; set one or name it")
    return names, work


def _merged(
    model: GraloraModel, names: Sequence[str], weights: Mapping[str, nn.Parameter], *, shares: bool = False
) -> TracedModel:
    merged = replace_weights(model.traced, weights)
    for adapter in map(model.adapter, names):
        if adapter.copies:
            from gralora_fx.core.adapters.module_copies import settle_copies

            merged = settle_copies(merged, adapter)
    return model._state.with_history(merged, " in the merged form", names, shares=shares).train(model.training)
