"""The linear layers of a graph, and reasons why an adapter at some of them would not do what PEFT's does.

Such layers must not count as adapted: layers that run where no adapter can be inserted, and layers whose forward
computes more than the product. PEFT adds an adapter's output to the output of the whole layer. Adding it to the product
is the same only if the forward does no more than move, cast or add to the operands and the product.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import fx, nn

from gralora_fx.base.compat.torch_graphs import HigherOrderOperator, OpOverload
from gralora_fx.core.graph.linear_calls import WEIGHTS, match_linear_call, noted_weights, origin_of, tensor_at
from gralora_fx.core.graph.module_tree import LINEAR_TYPES, ModuleTree, module_stack
from gralora_fx.core.graph.sites import LinearSite, find_sites

_KEY = "gralora_opaque"
# packages whose functions are visible in a graph, such as an embedding lookup
_KNOWN = ("torch", "_operator", "operator", "math", __name__.partition(".")[0])

# classes of layers that compute the product and the bias, and no more
_PRODUCTS = {f"{kind.__module__}.{kind.__qualname__}" for kind in LINEAR_TYPES}


# operators whose result holds values of their first argument, each at most once
_MOVES = {
    *("_to_copy", "_unsafe_view", "alias", "bfloat16", "chunk", "clone", "contiguous", "double", "flatten", "float"),
    *("getitem", "half", "identity", "lift_fresh", "movedim", "narrow", "permute", "reshape", "reshape_as", "select"),
    *("slice", "split", "split_with_sizes", "squeeze", "swapaxes", "t", "to", "transpose", "type", "type_as"),
    *("unbind", "unflatten", "unsqueeze", "unsafe_chunk", "unsafe_split", "view", "view_as"),
}
# operators that only add something to their first argument, or to their second
_ADDS, _SUBTRACTS = {"add", "add_", "iadd", "__add__", "__radd__"}, {"sub", "sub_", "isub", "__sub__"}
# operators that only read a tensor's size or dtype
_ASKS = {"_assert_tensor_metadata", "dim", "getattr", "new_empty", "new_zeros", "size", "sym_numel", "sym_size"}


class Layers(NamedTuple):
    """The linear layers of a graph."""

    sites: tuple[LinearSite, ...]  # every linear layer, in the order of the model's modules
    # reasons why an adapter would not take effect at every call of a layer, by path of such layers
    out_of_reach: dict[str, str]
    in_subgraphs: dict[str, str]  # the operators of the branches and loops that call layers, by the path of such layers


def layers_of(graph_module: fx.GraphModule, tree: ModuleTree) -> Layers:
    """Return the linear layers of a traced graph."""
    sites = find_sites(graph_module, tree)
    notes = ((node, node.meta.get("custom", {}).get(WEIGHTS, {})) for node in graph_module.graph.nodes)
    in_subgraphs = {path: str(node.target) for node, paths in notes for path in paths}
    return Layers(sites, why_out_of_reach(graph_module, tree, sites), in_subgraphs)


def note_opaque(node: fx.Node, reason: str) -> None:
    """Annotate a module call with the reason why its layers are not visible."""
    node.meta.setdefault("custom", {})[_KEY] = reason


def why_out_of_reach(graph_module: fx.GraphModule, tree: ModuleTree, sites: Iterable[LinearSite]) -> dict[str, str]:
    """Return reasons why an adapter would not take effect at every call of a layer, by the layer's path."""
    sites = list(sites)
    layers = {site.path: site for site in sites if site.path in tree.linear}
    owners: dict[int, list[str]] = {}
    for path, site in layers.items():
        owners.setdefault(id(site.weight), []).append(path)
    reasons = {
        site.path: f"it is {first}, registered again, and PEFT adapts a layer at its first name alone"
        for site in sites
        if (first := tree.canonical(site.path)) != site.path
    }
    for node in graph_module.graph.nodes:
        location = _opaque(node, graph_module)
        if location is not None:
            for path in _layers_within(node, graph_module, tree, owners):
                if not noted_weights(node, path):
                    reasons.setdefault(path, f"it is called {location}, where no adapter can be inserted")
                elif tree.types[path] not in _PRODUCTS:
                    reasons.setdefault(
                        path, f"it is called {location}, which does not show what {tree.types[path]} computes"
                    )
        innermost = next(reversed(_stack(node, tree)), None)
        if innermost is not None and innermost in layers and not layers[innermost].calls:
            reasons.setdefault(innermost, "what it computes is not a product of its input and a weight that it holds")
    calls = {name: path for path, site in layers.items() for name in site.calls}
    return {**why_more_than_products(graph_module, tree, calls), **reasons}


def _opaque(node: fx.Node, graph_module: fx.GraphModule) -> str | None:
    """Describe a node that runs code not visible in the graph; None for other nodes."""
    if node.op == "call_module":
        kind = type(graph_module.get_submodule(str(node.target))).__name__
        reason = node.meta.get("custom", {}).get(_KEY)
        return f"inside the module call {node.target} ({kind})" + (f", and {reason}" if reason else "")
    if node.op != "call_function":
        return None
    if isinstance(node.target, HigherOrderOperator):
        return f"inside the subgraph of {node.target} (node {node.name})"
    module = str(getattr(node.target, "__module__", None))
    if isinstance(node.target, types.FunctionType) and module.partition(".")[0] not in _KNOWN:
        return f"inside the function {module}.{node.target.__name__}"
    return None


def _layers_within(
    node: fx.Node, graph_module: fx.GraphModule, tree: ModuleTree, owners: Mapping[int, list[str]]
) -> Iterator[str]:
    """Return the paths of the layers that an opaque node may call."""
    if node.op == "call_module":
        parts = graph_module.get_submodule(str(node.target)).modules()
        for parameter in (p for part in parts if isinstance(part, LINEAR_TYPES) for p in part.parameters()):
            yield from owners.get(id(parameter), ())
        return
    for source in node.all_input_nodes:
        origin = origin_of(source)
        if origin is not None:
            yield from owners.get(id(tensor_at(graph_module, str(origin.node.target))), ())


def why_more_than_products(graph_module: fx.GraphModule, tree: ModuleTree, calls: Mapping[str, str]) -> dict[str, str]:
    """Return why an adapter beside the product would differ from PEFT's, by the path of such layers."""
    reasons: dict[str, str] = {}
    carrying: dict[fx.Node, str] = {}  # nodes of a layer whose value holds its product
    for node in graph_module.graph.nodes:
        if node.name in calls:
            path = carrying[node] = calls[node.name]
            other = _computed_before(node, path, tree, graph_module)
            if other is not None:
                reasons.setdefault(
                    path,
                    f"its forward changes its input first (node {other.name}), and PEFT's adapter takes it unchanged",
                )
            continue
        for path in {carrying[source] for source in node.all_input_nodes if source in carrying}:
            sources = [
                source
                for source in node.all_input_nodes
                if carrying.get(source) == path and _in_one_call(node, source, path, tree)
            ]
            if not sources or _operator(node, graph_module) in _ASKS:
                continue
            if not _keeps(node, sources, graph_module):
                reasons.setdefault(
                    path, f"its forward changes its product (node {node.name}), and PEFT's adapter is added after that"
                )
            elif sources[0] is node.args[0] or _operator(node, graph_module) in _ADDS:
                carrying[node] = path
    return reasons


def _computed_before(product: fx.Node, path: str, tree: ModuleTree, graph_module: fx.GraphModule) -> fx.Node | None:
    """Return the node within a call of a layer that computes the product's input from other values, or None."""
    match = match_linear_call(product, computed=True)
    node = None if match is None else match.input
    while node is not None and node.op not in ("placeholder", "get_attr") and _in_one_call(node, product, path, tree):
        if _operator(node, graph_module) not in _MOVES:
            return node
        node = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    return None


def _keeps(node: fx.Node, sources: list[fx.Node], graph_module: fx.GraphModule) -> bool:
    """Return whether a node keeps a product's values, possibly with something added."""
    name = _operator(node, graph_module)
    if name in _MOVES:
        return True
    is_first = bool(node.args) and node.args[0] is sources[0]
    is_once = len(sources) == 1 and sum(arg is sources[0] for arg in node.args) == 1
    if name in _ADDS:
        return is_once and (is_first or "alpha" not in node.kwargs)
    return name in _SUBTRACTS and is_once and is_first


def _operator(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """Return the name of the operator that a node calls, however it is spelled."""
    target = node.target
    if node.op == "call_module":
        module = graph_module.get_submodule(str(target))
        return "identity" if isinstance(module, nn.Identity) else type(module).__name__
    if target is getattr and node.args[1] in ("T", "mT"):
        return "t"
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _in_one_call(node: fx.Node, other: fx.Node, path: str, tree: ModuleTree) -> bool:
    """Return whether two nodes were traced in the same call of a layer."""
    call = tree.call_within(node, path)
    return call is not None and call == tree.call_within(other, path)


def _stack(node: fx.Node, tree: ModuleTree) -> list[str]:
    return [tree.canonical(path) for path, _ in module_stack(node)]
