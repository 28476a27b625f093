"""Redirection of parts of a graph to an adapter's copies of parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from gralora_fx.graph.annotations import annotate
from gralora_fx.graph.module_tree import ModuleTree, module_stack
from gralora_fx.graph.weight_views import tensor_at


def redirect_parameters(
    graph_module: fx.GraphModule, tree: ModuleTree, module: str, adapter: str, names: Mapping[str, str]
) -> bool:
    """Redirect the uses of a module's parameters inside that module to an adapter's copies.

    Before: `w = self.classifier.weight; y = linear(x, w)`
    After:  `w = self.gralora.default.classifier.weight; y = linear(x, w)`

    A parameter that another module holds too (a tied head) keeps its node for that module's uses, and a second node is
    added. One that only this module holds is replaced at all its uses, as `nn.MultiheadAttention` uses the weight of
    its `out_proj` without calling the layer.

    Args:
        graph_module: The graph; it must be recompiled afterwards.
        tree: The modules of the source model.
        module: Path of the module.
        adapter: Name of the adapter.
        names: Attribute paths of the copies in `graph_module`, by the full name of the base's parameter.

    Returns:
        Whether any use was redirected.
    """
    graph = graph_module.graph
    copies = {id(tree.parameters[name]): path for name, path in names.items()}
    base_names = {id(tree.parameters[name]): name for name in names}
    has_changed = False
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        parameter = tensor_at(graph_module, str(node.target))
        path = copies.get(id(parameter))
        if path is None or path == node.target:
            continue
        holders = [
            tree.canonical(n.rpartition(".")[0]) for n in tree.names_of(tree.parameters[base_names[id(parameter)]])
        ]
        is_tied = not all(f"{holder}.".startswith(f"{module}.") for holder in holders)
        inside = [user for user in node.users if not is_tied or _is_inside(user, module, tree)]
        if not inside:
            continue
        if len(inside) == len(node.users):
            annotate(node, site=module, adapter=adapter, owns=str(node.target))
            node.target = path
        else:
            with graph.inserting_after(node):
                copy_node = graph.get_attr(path)
            annotate(copy_node, site=module, adapter=adapter, owns=base_names[id(parameter)], beside=node.name)
            for user in inside:
                user.replace_input_with(node, copy_node)
        has_changed = True
    return has_changed


def _is_inside(node: fx.Node, module: str, tree: ModuleTree) -> bool:
    paths = [tree.canonical(path) for path, _ in module_stack(node)]
    return any(path == module or path.startswith(f"{module}.") for path in paths)
