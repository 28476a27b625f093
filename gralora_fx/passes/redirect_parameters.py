"""Redirection of parts of a graph to an adapter's copies of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from gralora_fx.errors import RewriteError
from gralora_fx.graph.module_tree import ModuleTree, module_stack
from gralora_fx.graph.pipeline import PassResult, contract
from gralora_fx.graph.surgery import annotate, module_of
from gralora_fx.graph.weight_views import tensor_at
from gralora_fx.passes.set_weights import OWN_WEIGHTS


@contract(ends={OWN_WEIGHTS})
@dataclass(frozen=True)
class RedirectParameters:
    """Redirect the uses of a module's parameters inside that module to an adapter's copies.

    Before: `w = self.classifier.weight; y = linear(x, w)`
    After:  `w = self.gralora.default.classifier.weight; y = linear(x, w)`

    A parameter that another module holds too (a tied head) keeps its node for that module's uses, and a second node is
    added. One that only this module holds is replaced at all its uses, as `nn.MultiheadAttention` uses the weight of
    its `out_proj` without calling the layer.

    Attributes:
        tree: The modules of the source model.
        module: Path of the module.
        adapter: Name of the adapter.
        names: Attribute paths of the copies in the graph module, by the full name of the base's parameter.
    """

    tree: ModuleTree
    module: str
    adapter: str
    names: Mapping[str, str]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Redirect them.

        Raises:
            RewriteError: The graph calls the module as one node, so nothing in it can be redirected.
        """
        bases = {id(self.tree.parameters[name]): name for name in self.names}
        changed = 0
        for node in [node for node in graph.nodes if node.op == "get_attr"]:
            base = bases.get(id(tensor_at(module_of(graph), str(node.target))))
            if base is not None and self.names[base] != node.target:
                changed += self._redirect(node, base)
        if not changed and any(str(node.target) == self.module for node in graph.nodes):
            raise RewriteError(
                f"{self.module} is a module call in this graph, so modules_to_save and bias cannot replace its "
                "parameters; trace the model from its nn.Module instead"
            )
        return PassResult(changed)

    def _redirect(self, node: fx.Node, base: str) -> bool:
        """Redirect the users of a parameter's node that are inside the module; whether there are any."""
        holders = [self.tree.canonical(n.rpartition(".")[0]) for n in self.tree.names_of(self.tree.parameters[base])]
        is_tied = not all(f"{holder}.".startswith(f"{self.module}.") for holder in holders)
        inside = [user for user in node.users if not is_tied or _is_inside(user, self.module, self.tree)]
        if not inside:
            return False
        if len(inside) == len(node.users):
            annotate(node, site=self.module, adapter=self.adapter, owns=str(node.target))
            node.target = self.names[base]
            return True
        with node.graph.inserting_after(node):
            copy_node = node.graph.get_attr(self.names[base])
        annotate(copy_node, site=self.module, adapter=self.adapter, owns=base, beside=node.name)
        for user in inside:
            user.replace_input_with(node, copy_node)
        return True


def _is_inside(node: fx.Node, module: str, tree: ModuleTree) -> bool:
    paths = [tree.canonical(path) for path, _ in module_stack(node)]
    return any(path == module or path.startswith(f"{module}.") for path in paths)
