"""Other parameters for a graph: weights of sites, untied first from what else reads them, and adapters' copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from gralora_fx.core.graph.linear_calls import calls_at, is_view, readers, tensor_at
from gralora_fx.core.graph.module_tree import ModuleTree, is_within, module_stack
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.sites import LinearSite, ParameterSite
from gralora_fx.core.graph.surgery import annotate, module_of, replace_parameters
from gralora_fx.errors import MergeError, RewriteError

OWN_WEIGHTS = "calls read the weights of their layers"
_UNTIED = "weights are untied"
_KEY = "separated"


@contract(needs={OWN_WEIGHTS}, leaves={_UNTIED})
@dataclass(frozen=True)
class UntieWeights:
    """Let the calls of sites read attributes of their own, which hold the same parameters.

    Before: `w = self.head.weight; e = embedding(w, ids); y = linear(x, w)`
    After:  `w = self.head.weight; w_1 = self.embed.weight; e = embedding(w_1, ids); y = linear(x, w)`

    If both read the layer's own name, the others are redirected to another name of the tied weight. If the weight has
    no other name, the layer reads `separated_path(site)`. A tied weight with a node for each name needs no new node.

    Attributes:
        sites: The sites to untie.
    """

    sites: tuple[LinearSite, ...]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Untie them."""
        by_name = {node.name: node for node in graph.nodes}
        layers = [site for site in self.sites if not isinstance(site, ParameterSite)]  # no other is tied
        return PassResult(sum(_untie(module_of(graph), site, by_name) for site in layers))


@contract(needs={OWN_WEIGHTS, _UNTIED})
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

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Replace them."""
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


@contract(ends={OWN_WEIGHTS})
@dataclass(frozen=True)
class RedirectParameters:
    """Redirect the uses of modules' parameters inside those modules to an adapter's copies.

    Before: `w = self.classifier.weight; y = linear(x, w)`
    After:  `w = self.gralora.default.classifier.weight; y = linear(x, w)`

    A parameter that another module holds too (a tied head) keeps its node for that module's uses, and a second node is
    added. One that only this module holds is replaced at all its uses, as `nn.MultiheadAttention` uses the weight of
    its `out_proj` without calling the layer.

    Attributes:
        tree: The modules of the source model.
        adapter: Name of the adapter.
        names: Attribute paths of the copies in the graph module, by module path, then by the full name of the base's
            parameter.
    """

    tree: ModuleTree
    adapter: str
    names: Mapping[str, Mapping[str, str]]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Redirect them."""
        bases: dict[int, dict[str, str]] = {}  # by the id of a parameter: its full name, by module
        for module, names in self.names.items():
            for name in names:
                bases.setdefault(id(self.tree.parameters[name]), {})[module] = name
        changed = dict.fromkeys(self.names, 0)
        for node in [node for node in graph.nodes if node.op == "get_attr"]:
            target = node.target
            for module, base in bases.get(id(tensor_at(module_of(graph), str(target))), {}).items():
                is_bases = node.target == target  # else another module had all of its users
                if is_bases and target != self.names[module][base]:
                    changed[module] += self._redirect(node, module, base)
        unchanged = [module for module, count in changed.items() if not count]
        called = {str(node.target) for node in graph.nodes} if unchanged else ()
        for module in unchanged:
            if module in called:
                raise RewriteError(
                    f"{module} is a module call in this graph, so modules_to_save and bias cannot replace its "
                    "parameters; trace the model from its nn.Module instead"
                )
        return PassResult(sum(changed.values()))

    def _redirect(self, node: fx.Node, module: str, base: str) -> bool:
        """Redirect the users of a parameter's node that are inside a module; whether there are any."""
        is_tied = is_tied_outside(self.tree.parameters[base], module, self.tree)
        inside = [user for user in node.users if not is_tied or is_inside(user, module, self.tree)]
        if not inside:
            return False
        copy_name = self.names[module][base]
        if len(inside) == len(node.users):
            annotate(node, site=module, adapter=self.adapter, owns=str(node.target))
            node.target = copy_name
            return True
        with node.graph.inserting_after(node):
            copy_node = node.graph.get_attr(copy_name)
        annotate(copy_node, site=module, adapter=self.adapter, owns=base, beside=node.name)
        for user in inside:
            user.replace_input_with(node, copy_node)
        return True


def is_tied_outside(parameter: Any, module: str, tree: ModuleTree) -> bool:
    """Return whether a parameter of a module is held by one outside of it too, as a tied head is."""
    holders = (tree.canonical(name.rpartition(".")[0]) for name in tree.names_of(parameter))
    return not all(is_within(holder, module) for holder in holders)


def is_inside(node: fx.Node, module: str, tree: ModuleTree) -> bool:
    """Return whether a node is of a module's own forward."""
    paths = [tree.canonical(path) for path, _ in module_stack(node)]
    return any(is_within(path, module) for path in paths)


def separated_path(site: LinearSite) -> str:
    """The attribute that an untied layer reads if its weight has no other name."""
    return f"{_KEY}.{site.path or 'root'}.weight"


def is_separated(graph_module: fx.GraphModule, site: LinearSite) -> bool:
    """Whether a layer was untied in such a way."""
    return _has(graph_module, separated_path(site))


def _untie(graph_module: fx.GraphModule, site: LinearSite, by_name: Mapping[str, fx.Node]) -> bool:
    """Untie one site; whether that changed anything."""
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
    """Redirect users of a weight's nodes to the same parameter at another path."""
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
