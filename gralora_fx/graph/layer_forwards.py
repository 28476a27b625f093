"""Linear layers whose forward computes more than the product, which would change an adapter's output too.

PEFT adds an adapter's output to the output of the whole layer. Adding it to the product is the same only if the layer's
forward does no more than move, cast or add to the operands and the product.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from gralora_fx.compat.torch_graphs import OpOverload
from gralora_fx.graph.module_tree import ModuleTree, module_stack
from gralora_fx.graph.sites import match_linear_call

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


def why_more_than_products(graph_module: fx.GraphModule, tree: ModuleTree, calls: Mapping[str, str]) -> dict[str, str]:
    """The layers where an adapter beside the product would differ from PEFT's, by path, with the reason.

    Args:
        graph_module: A graph.
        tree: The modules of the model it was traced from.
        calls: Path of the layer by the name of the node that calls it.
    """
    reasons: dict[str, str] = {}
    carrying: dict[fx.Node, str] = {}  # nodes of a layer whose value holds its product
    for node in graph_module.graph.nodes:
        if node.name in calls:
            path = carrying[node] = calls[node.name]
            other = _computed_before(node, path, tree, calls, graph_module)
            if other is not None:
                reasons.setdefault(
                    path,
                    f"its forward changes its input first (node {other.name}), and PEFT's adapter takes it unchanged",
                )
            continue
        for path in {carrying[source] for source in node.all_input_nodes if source in carrying}:
            if path not in _stack(node, tree) or _operator(node, graph_module) in _ASKS:
                continue
            sources = [source for source in node.all_input_nodes if carrying.get(source) == path]
            if not _keeps(node, sources, graph_module):
                reasons.setdefault(
                    path, f"its forward changes its product (node {node.name}), and PEFT's adapter is added after that"
                )
            elif sources[0] is node.args[0] or _operator(node, graph_module) in _ADDS:
                carrying[node] = path
    return reasons


def _computed_before(
    product: fx.Node, path: str, tree: ModuleTree, calls: Mapping[str, str], graph_module: fx.GraphModule
) -> fx.Node | None:
    """The node within a layer that computes the product's input from other values, if there is one."""
    match = match_linear_call(product, computed=True)
    node = None if match is None else match.input
    while node is not None and node.op not in ("placeholder", "get_attr") and path in _stack(node, tree):
        if node.name in calls or _operator(node, graph_module) not in _MOVES:
            return node
        node = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    return None


def _keeps(node: fx.Node, sources: list[fx.Node], graph_module: fx.GraphModule) -> bool:
    """Whether a node keeps a product's values, possibly with something added."""
    name = _operator(node, graph_module)
    if name in _MOVES:
        return True
    is_first = bool(node.args) and node.args[0] is sources[0]
    is_once = len(sources) == 1 and sum(arg is sources[0] for arg in node.args) == 1
    if name in _ADDS:
        return is_once and (is_first or "alpha" not in node.kwargs)
    return name in _SUBTRACTS and is_once and is_first


def _operator(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """Name of the operator that a node calls, however it is spelled."""
    target = node.target
    if node.op == "call_module":
        module = graph_module.get_submodule(str(target))
        return "identity" if isinstance(module, nn.Identity) else type(module).__name__
    if target is getattr and node.args[1] in ("T", "mT"):
        return "t"
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _stack(node: fx.Node, tree: ModuleTree) -> list[str]:
    return [tree.canonical(path) for path, _ in module_stack(node)]
