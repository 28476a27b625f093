"""Linear layers that run where no adapter can be inserted, with the reason; they must not count as adapted."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from gralora_fx.compat.torch_graphs import HigherOrderOperator
from gralora_fx.graph.layer_forwards import why_more_than_products
from gralora_fx.graph.module_tree import LINEAR_TYPES, ModuleTree, module_stack
from gralora_fx.graph.sites import LinearSite
from gralora_fx.graph.subgraph_calls import noted_weights
from gralora_fx.graph.weight_views import origin_of, tensor_at

_KEY = "gralora_opaque"
# packages whose functions are visible in a graph, such as an embedding lookup
_KNOWN = ("torch", "_operator", "operator", "math", __name__.partition(".")[0])

# classes of layers that compute the product and the bias, and no more
_PRODUCTS = {f"{kind.__module__}.{kind.__qualname__}" for kind in LINEAR_TYPES}


def note_opaque(node: fx.Node, reason: str) -> None:
    """Annotate a module call with the reason why its layers are not visible."""
    node.meta.setdefault("custom", {})[_KEY] = reason


def why_out_of_reach(graph_module: fx.GraphModule, tree: ModuleTree, sites: Iterable[LinearSite]) -> dict[str, str]:
    """Reasons why an adapter would not take effect at every call of a layer, by path of such layers.

    Args:
        graph_module: The traced graph.
        tree: The modules of the model it was traced from.
        sites: The sites of the graph.
    """
    layers = {site.path: site for site in sites if site.path in tree.linear}
    owners: dict[int, list[str]] = {}
    for path, site in layers.items():
        owners.setdefault(id(site.weight), []).append(path)
    reasons: dict[str, str] = {}
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
        innermost = _innermost(node, tree)
        if innermost is not None and innermost in layers and not layers[innermost].calls:
            reasons.setdefault(innermost, "what it computes is not a product of its input and a weight that it holds")
    calls = {name: path for path, site in layers.items() for name in site.calls}
    return {**why_more_than_products(graph_module, tree, calls), **reasons}


def _opaque(node: fx.Node, graph_module: fx.GraphModule) -> str | None:
    """A description of a node that runs code not visible in the graph; None for other nodes."""
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
    """Paths of the layers that an opaque node may call."""
    if node.op == "call_module":
        parts = graph_module.get_submodule(str(node.target)).modules()
        for parameter in (p for part in parts if isinstance(part, LINEAR_TYPES) for p in part.parameters()):
            yield from owners.get(id(parameter), ())
        return
    for source in node.all_input_nodes:
        origin = origin_of(source)
        if origin is not None:
            yield from owners.get(id(tensor_at(graph_module, str(origin.node.target))), ())


def _innermost(node: fx.Node, tree: ModuleTree) -> str | None:
    stack = [path for path, _ in module_stack(node)]
    return tree.canonical(stack[-1]) if stack else None
