"""New weights for the sites of a graph, after untying them from other readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from gralora_fx.core.graph.linear_calls import calls_at, is_view, readers
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.sites import LinearSite, ParameterSite
from gralora_fx.core.graph.surgery import annotate, module_of, replace_parameters
from gralora_fx.errors import MergeError

OWN_WEIGHTS = "calls read the weights of their layers"
_UNTIED = "weights are untied"
_KEY = "separated"


@contract(needs={OWN_WEIGHTS}, leaves={_UNTIED})
@dataclass(frozen=True)
class UntieWeights:
    """Make the calls of sites read attributes of their own, which hold the same parameters.

    Before: `w = self.head.weight; e = embedding(w, ids); y = linear(x, w)`
    After:  `w = self.head.weight; w_1 = self.embed.weight; e = embedding(w_1, ids); y = linear(x, w)`

    If both read the layer's own name, the others get another name of the tied weight; without one, the layer reads
    `separated_path(site)`.
    """

    sites: tuple[LinearSite, ...]  # the sites to untie

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Untie the sites."""
        by_name = {node.name: node for node in graph.nodes}
        layers = [site for site in self.sites if not isinstance(site, ParameterSite)]  # no other is tied
        return PassResult(sum(_untie(module_of(graph), site, by_name) for site in layers))


@contract(needs={OWN_WEIGHTS, _UNTIED})
@dataclass(frozen=True)
class SetWeights:
    """Replace the weights that calls of sites read; other readers of them get the new ones (see `UntieWeights`)."""

    sites: tuple[LinearSite, ...]  # sites of the graph
    weights: Mapping[str, nn.Parameter]  # new weights by site path, for some of the sites

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Replace the weights."""
        by_name = {node.name: node for node in graph.nodes}
        parameters: dict[str, nn.Parameter] = {}
        for site in self.sites:
            if site.path not in self.weights:
                continue
            for name in site.calls:
                node = by_name[name]
                reads = [node] if isinstance(site, ParameterSite) else [c.weight for c in calls_at(node, site.path)]
                parameters |= {str(read.target): self.weights[site.path] for read in reads}
        replace_parameters(module_of(graph), parameters)
        return PassResult(len(parameters))


def separated_path(site: LinearSite) -> str:
    """Return the attribute path for an untied layer whose weight has no other name."""
    return f"{_KEY}.{site.path or 'root'}.weight"


def is_separated(graph_module: fx.GraphModule, site: LinearSite) -> bool:
    """Return whether a layer was untied to `separated_path`."""
    return _has(graph_module, separated_path(site))


def _untie(graph_module: fx.GraphModule, site: LinearSite, by_name: Mapping[str, fx.Node]) -> bool:
    site_calls = [call for name in site.calls for call in calls_at(by_name[name], site.path)]
    calls, targets = {call.node for call in site_calls}, {str(call.weight.target) for call in site_calls}
    sources = [node for node in graph_module.graph.find_nodes(op="get_attr") if str(node.target) in targets]
    inside, outside = _split_readers(sources, calls)
    mixed = [user.name for user in set(inside) & set(outside)]
    if mixed:
        raise MergeError(
            f"the weight of {site.path} cannot be untied: it is read through {', '.join(mixed)}, which something "
            "else reads too; untie it in the model before tracing"
        )
    if not outside:
        return False
    if site.tied_with and targets == {f"{site.path}.weight"}:
        _redirect(graph_module, site, outside, site.tied_with[0])
    else:
        _redirect(graph_module, site, inside, separated_path(site))
    return True


def _split_readers(
    sources: Iterable[fx.Node], calls: set[fx.Node]
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """Split the users of a weight's nodes into those that lead to given calls and the others, with their sources."""
    inside: dict[fx.Node, fx.Node] = {}
    outside: dict[fx.Node, fx.Node] = {}
    for source in sources:
        for user in source.users:
            through = set(readers(user)) if is_view(user) else {user}
            if through & calls:
                inside[user] = source
            if through - calls:
                outside[user] = source
    return inside, outside


def _redirect(graph_module: fx.GraphModule, site: LinearSite, users: dict[fx.Node, fx.Node], path: str) -> None:
    """Redirect users of a weight's nodes to another path of the same parameter."""
    if not _has(graph_module, path):
        replace_parameters(graph_module, {path: site.weight})
    new_nodes: dict[fx.Node, fx.Node] = {}
    for user, source in users.items():
        if source not in new_nodes:
            with graph_module.graph.inserting_after(source):
                new_nodes[source] = graph_module.graph.get_attr(path)
            new_nodes[source].meta |= {key: value for key, value in source.meta.items() if key != "custom"}
            annotate(new_nodes[source], site=site.path, adapter=None, separated=source.name)
        user.replace_input_with(source, new_nodes[source])


def _has(graph_module: fx.GraphModule, path: str) -> bool:
    owner, _, attribute = path.rpartition(".")
    try:
        return attribute in graph_module.get_submodule(owner)._parameters
    except AttributeError:
        return False
