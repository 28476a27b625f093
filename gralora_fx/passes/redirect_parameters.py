"""Redirection of parts of a graph to an adapter's copies of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from gralora_fx.errors import RewriteError
from gralora_fx.graph.module_tree import ModuleTree, is_within, module_stack
from gralora_fx.graph.pipeline import PassResult, contract
from gralora_fx.graph.surgery import annotate, module_of
from gralora_fx.graph.weight_views import tensor_at
from gralora_fx.passes.set_weights import OWN_WEIGHTS


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
        """Redirect them.

        Raises:
            RewriteError: The graph calls a module as one node, so nothing in it can be redirected.
        """
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
        names = self.tree.names_of(self.tree.parameters[base])
        holders = [self.tree.canonical(name.rpartition(".")[0]) for name in names]
        is_tied = not all(is_within(holder, module) for holder in holders)
        inside = [user for user in node.users if not is_tied or _is_inside(user, module, self.tree)]
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


def _is_inside(node: fx.Node, module: str, tree: ModuleTree) -> bool:
    paths = [tree.canonical(path) for path, _ in module_stack(node)]
    return any(is_within(path, module) for path in paths)
