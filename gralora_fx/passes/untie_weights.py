"""Give a linear layer a weight of its own where its calls read one that something else reads too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from gralora_fx.errors import MergeError
from gralora_fx.graph.annotations import mark
from gralora_fx.graph.sites import LinearSite, calls_at
from gralora_fx.graph.weight_views import is_view, readers
from gralora_fx.passes.overlay import replace_parameters

_KEY = "separated"


def separate_weights(graph_module: fx.GraphModule, sites: Iterable[LinearSite]) -> dict[str, str]:
    """Let the calls of sites read attributes that nothing else reads, over the same parameters.

    Before: `w = self.head.weight; e = embedding(w, ids); y = linear(x, w)`
    After:  `w = self.head.weight; w_1 = self.embed.weight; e = embedding(w_1, ids); y = linear(x, w)`

    Where the layer's own name is the one that both read, the others read another name of the tied weight from now on.
    Where the weight has no other name, the layer reads `separated.<path>.weight`. A tied weight that has a node for
    each of its names needs no new node.

    Args:
        graph_module: The graph; it must be recompiled afterwards.
        sites: The sites to separate.

    Returns:
        The attribute path of each weight that got a new one, by site path.

    Raises:
        MergeError: A call shares a view of its weight with something else. The graph must be discarded then.
    """
    graph = graph_module.graph
    by_name = {node.name: node for node in graph.nodes}
    made: dict[str, str] = {}
    for site in sites:
        found = [call for name in site.calls for call in calls_at(by_name[name], site)]
        calls, targets = {call.node for call in found}, {str(call.weight.target) for call in found}
        sources = [node for node in graph.find_nodes(op="get_attr") if str(node.target) in targets]
        inside, outside = _split_readers(sources, calls)
        mixed = [user.name for user in set(inside) & set(outside)]
        if mixed:
            raise MergeError(
                f"the weight of {site.path} cannot be untied: it is read through {', '.join(mixed)}, which something "
                "else reads too; untie it in the model before tracing"
            )
        if not outside:
            continue
        if site.tied_with and targets == {f"{site.path}.weight"}:
            _redirect(graph_module, site, outside, site.tied_with[0])
        else:
            made[site.path] = f"{_KEY}.{site.path or 'root'}.weight"
            _redirect(graph_module, site, inside, made[site.path])
    return made


def _split_readers(
    sources: Iterable[fx.Node], calls: set[fx.Node]
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """The users of a weight's nodes that lead to the given calls, and those that lead elsewhere, with their source."""
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
    """Let users of a weight's nodes read the same parameter at another path."""
    if not _has(graph_module, path):
        replace_parameters(graph_module, {path: site.weight})
    own: dict[fx.Node, fx.Node] = {}
    for user, source in users.items():
        if source not in own:
            with graph_module.graph.inserting_after(source):
                own[source] = graph_module.graph.get_attr(path)
            own[source].meta |= {key: value for key, value in source.meta.items() if key != "custom"}
            mark(own[source], site=site.path, adapter=None, separated=source.name)
        user.replace_input_with(source, own[source])


def _has(graph_module: fx.GraphModule, path: str) -> bool:
    owner, _, attribute = path.rpartition(".")
    try:
        return attribute in graph_module.get_submodule(owner)._parameters
    except AttributeError:
        return False
