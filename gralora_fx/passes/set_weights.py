"""Other weights for sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from gralora_fx.graph.overlay import replace_parameters
from gralora_fx.graph.pipeline import PassResult
from gralora_fx.graph.sites import LinearSite, calls_at


@dataclass(frozen=True)
class SetWeights:
    """Replace the weights that the calls of sites read; no node changes.

    Whatever else reads the same attribute gets the new weight too: see `UntieWeights`.

    Attributes:
        sites: Sites of the graph.
        weights: New weights by site path, for some of them.
    """

    sites: tuple[LinearSite, ...]
    weights: Mapping[str, nn.Parameter]

    def __call__(self, graph_module: fx.GraphModule) -> PassResult[fx.GraphModule]:
        """Replace them."""
        by_name = {node.name: node for node in graph_module.graph.nodes}
        parameters: dict[str, nn.Parameter] = {}
        for site in self.sites:
            if site.path not in self.weights:
                continue
            for name in site.calls:
                for call in calls_at(by_name[name], site):
                    parameters[str(call.weight.target)] = self.weights[site.path]
        replace_parameters(graph_module, parameters)
        return PassResult(len(parameters))
