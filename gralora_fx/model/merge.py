"""`merge`: the adapter-free model with folded weights, beside the one it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import fx, nn

from gralora_fx.adapters.folded_adapters import describe_folded
from gralora_fx.adapters.installed import InstalledAdapter
from gralora_fx.errors import MergeError
from gralora_fx.graph.annotations import mark_of, marked_nodes, unmark
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.passes.adapter_paths import adapter_names as as_names
from gralora_fx.passes.adapter_paths import copy_path, put
from gralora_fx.passes.fold_weights import SiteUpdate, deferred_weights, folded_weights
from gralora_fx.passes.replace_weights import with_weights
from gralora_fx.tracing.traced_model import CALL_TRACE, TracedModel


def merge(
    model: GraloraModel,
    adapter_names: Sequence[str] | str | None = None,
    *,
    safe: bool = True,
    untie: bool = False,
) -> TracedModel:
    """The base model, node for node, with adapters folded into its weights.

    The given model and the base's weights stay as they are; only the folded weights are new. Updates are accumulated
    in float32 or better and rounded once.

    Args:
        model: A rewritten model.
        adapter_names: Which adapters to fold; None for the active ones.
        safe: Whether to check that every folded weight is finite.
        untie: Whether a layer with a tied weight gets one of its own in the result, instead of being refused.

    Returns:
        A traced model in the mode of `model`, which remembers the adapters (`merged_adapters`).

    Raises:
        RewriteError: There is no such adapter, or two of them have no common result (see `set_adapter`).
        MergeError: There is nothing to fold, a weight is tied to another layer, or would not be finite.
    """
    names, work = _work(model, adapter_names)
    weights = folded_weights(model.traced.graph_module, work, safe=safe, untie=untie)
    merged = _merged(model, names, weights)
    merged.merged_adapters = describe_folded([model.installed(name) for name in names], model.traced, own=False)
    return merged


def merge_deferred(model: GraloraModel, adapter_names: Sequence[str] | str | None = None) -> TracedModel:
    """The same, whose folded weights stand on the meta device and are made when they are read (see `deferred`).

    So a whole model is folded and written with the memory of one weight; it cannot be run. Whether a weight is finite
    is checked when it is made.

    Args:
        model: A rewritten model.
        adapter_names: Which adapters to fold; None for the active ones.

    Raises:
        RewriteError: As `merge`.
        MergeError: As `merge`.
    """
    names, work = _work(model, adapter_names)
    return _merged(model, names, deferred_weights(model.traced.graph_module, work))


def _work(model: GraloraModel, adapter_names: Sequence[str] | str | None) -> tuple[list[str], list[SiteUpdate]]:
    """The adapters to fold and their updates."""
    if not isinstance(model, GraloraModel):
        first = "" if isinstance(model, TracedModel) else f"{CALL_TRACE} then rewrite(), and "
        raise MergeError(f"cannot merge a {type(model).__name__}; {first}give what rewrite() returned")
    names = list(model.active_adapters) if adapter_names is None else as_names(adapter_names)
    if twice := [name for name in names if names.count(name) > 1]:
        raise MergeError(f"adapter {twice[0]!r} is named twice, and would be folded twice; name it once")
    work = model.updates(names)
    if not work:
        raise MergeError("no adapter is active, so there is nothing to merge; set one or name it")
    return names, work


def _merged(model: GraloraModel, names: Sequence[str], weights: Mapping[str, nn.Parameter]) -> TracedModel:
    merged = with_weights(model.traced, weights)
    for name in names:
        merged = _settle_copies(merged, model.installed(name))
    return merged.train(model.training)


def _settle_copies(merged: TracedModel, adapter: InstalledAdapter) -> TracedModel:
    """Put an adapter's copies of base parameters in the base's place, by name.

    A parameter that other modules read too (a tied head) keeps its place for them; the module reads its own beside it.
    """
    if not adapter.copies:
        return merged
    graph_module = fx.GraphModule(merged.graph_module, copy_graph(merged.graph_module), "MergedGraph")
    settled: dict[str, nn.Parameter] = {}
    for owned in adapter.copies.values():
        settled |= {base: nn.Parameter(p.detach().clone(), requires_grad=False) for base, p in owned.items()}
    for base, parameter in settled.items():
        put(graph_module, copy_path(adapter.name, base), parameter)
    adapter.own(graph_module, merged.tree)
    for node in list(marked_nodes(graph_module.graph, adapter.name)):
        found = mark_of(node) or {}
        if "beside" not in found:
            owner, _, attribute = found["owns"].rpartition(".")
            graph_module.get_submodule(owner)._parameters[attribute] = graph_module.get_parameter(str(node.target))
            node.target = found["owns"]
        unmark(node)
    graph_module = fx.GraphModule(graph_module, graph_module.graph, "MergedGraph")  # without what it no longer reads
    tree = dataclasses.replace(merged.tree, parameters={**merged.tree.parameters, **settled})
    return merged.with_graph(graph_module, tree)
