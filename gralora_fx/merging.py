"""`merge`: the adapter-free model with folded weights, beside the one it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx, nn

from gralora_fx.errors import MergeError
from gralora_fx.model import GraloraModel
from gralora_fx.passes.fold import folded_weights, set_weights
from gralora_fx.tracing.clean import copy_graph
from gralora_fx.tracing.traced import TracedModel


def merge(model: GraloraModel, adapter_names: Sequence[str] | None = None, *, safe: bool = True) -> TracedModel:
    """The base model, node for node, with adapters folded into its weights.

    The given model and the base's weights stay as they are; only the folded weights are new. Updates are accumulated
    in float32 or better and rounded once.

    Args:
        model: A rewritten model.
        adapter_names: Which adapters to fold; None for the active ones.
        safe: Whether to check that every folded weight is finite.

    Returns:
        A traced model in the mode of `model`.

    Raises:
        RewriteError: There is no such adapter.
        MergeError: There is nothing to fold, a weight is tied to another layer, or would not be finite.
    """
    work = model.updates(adapter_names)
    if not work:
        raise MergeError("no adapter is active, so there is nothing to merge; set one or name it")
    traced = model.traced
    weights = folded_weights(traced.graph_module, work, safe=safe)
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "MergedGraph")
    set_weights(graph_module, model.sites, weights)
    replaced = {id(entry.site.weight): weights[entry.site.path] for entry in work}
    names = model.active_adapters if adapter_names is None else adapter_names
    for name in names:
        for owned in model.installed(name).copies.values():
            for base, parameter in owned.items():
                replaced[id(traced.tree.parameters[base])] = nn.Parameter(parameter.detach().clone(), False)
    for name, parameter in graph_module.named_parameters(remove_duplicate=False):
        if id(parameter) in replaced:
            owner, _, attribute = name.rpartition(".")
            graph_module.get_submodule(owner)._parameters[attribute] = replaced[id(parameter)]
    parameters = {name: replaced.get(id(p), p) for name, p in traced.tree.parameters.items()}
    tree = dataclasses.replace(traced.tree, parameters=parameters)
    return traced.with_graph(graph_module, tree).train(model.training)
