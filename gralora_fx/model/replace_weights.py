"""Copies of a traced model with other weights at some of its sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx, nn

from gralora_fx.graph.surgery import copy_graph
from gralora_fx.passes.set_weights import SetWeights
from gralora_fx.passes.untie_weights import UntieWeights, is_separated, separated_path
from gralora_fx.tracing.traced_model import TracedModel


def replace_weights(traced: TracedModel, weights: Mapping[str, nn.Parameter]) -> TracedModel:
    """A copy of the traced model with other weights; the given model and its parameters stay unchanged.

    Of a shared weight, such as a head's tied to the embedding, only the layer gets the new one.

    Args:
        traced: A traced model.
        weights: New weights by site path, of the shapes of the old ones.

    Raises:
        MergeError: A layer shares a view of its weight with something else.
    """
    if not weights:
        return traced
    sites = tuple(site for site in traced.sites if site.path in weights)
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "MergedGraph")
    for graph_pass in (UntieWeights(sites), SetWeights(sites, weights)):
        graph_pass(graph_module)
    parameters = dict(traced.tree.parameters)
    for site in sites:
        names = set(traced.tree.names_of(site.weight)) - set(site.tied_with)
        if is_separated(graph_module, site):
            names = {separated_path(site)}
        parameters |= dict.fromkeys(names, weights[site.path])
    graph_module = fx.GraphModule(
        graph_module, graph_module.graph, "MergedGraph"
    )  # drops what the graph no longer reads
    return traced.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters)).train(
        traced.training
    )
