"""An adapter's copies of modules' parameters (`modules_to_save`, `bias`) replace the base's own in a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from gralora_fx.core.adapters.adapter import ModelAdapter, copy_path, put
from gralora_fx.core.adapters.other_parameters import OWN_WEIGHTS
from gralora_fx.core.graph.linear_calls import tensor_at
from gralora_fx.core.graph.module_tree import ModuleTree, is_within, module_stack
from gralora_fx.core.graph.pipeline import PassResult, Pipeline, contract
from gralora_fx.core.graph.surgery import (
    annotate,
    annotated_nodes,
    annotation_of,
    copy_graph,
    module_of,
    remove_annotation,
)
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError


@contract(ends={OWN_WEIGHTS})
@dataclass(frozen=True)
class RedirectParameters:
    """Redirect reads of modules' parameters inside those modules to an adapter's copies.

    Before: `w = self.classifier.weight; y = linear(x, w)`
    After:  `w = self.gralora.default.classifier.weight; y = linear(x, w)`

    A parameter that another module holds too (a tied head) keeps its node for that module's uses. Any other is replaced
    at all its uses: `nn.MultiheadAttention` uses the weight of its `out_proj` without calling the layer.
    """

    tree: ModuleTree  # the modules of the source model
    adapter: str  # name of the adapter
    # attribute paths of the copies in the graph module, by module path, then by the base parameter's full name
    names: Mapping[str, Mapping[str, str]]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Redirect the reads."""
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
        """Redirect the users of a parameter's node that are inside a module; return whether there are any."""
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


def redirection(adapter: ModelAdapter, tree: ModuleTree) -> RedirectParameters:
    """Return the pass that redirects a graph to an adapter's copies of base parameters."""
    return RedirectParameters(tree, adapter.name, {module: owned.paths for module, owned in adapter.copies.items()})


def settle_copies(merged: TracedModel, adapter: ModelAdapter) -> TracedModel:
    """Replace the base's parameters by an adapter's copies, under new names where other modules read them too."""
    graph_module = fx.GraphModule(merged.graph_module, copy_graph(merged.graph_module), "MergedGraph")
    settled: dict[str, nn.Parameter] = {}
    for owned in adapter.copies.values():
        settled |= {base: nn.Parameter(p.detach().clone(), requires_grad=False) for base, p in owned.items()}
    for base, parameter in settled.items():
        put(graph_module, copy_path(adapter.name, base), parameter)
    Pipeline("copies", (redirection(adapter, merged.tree),)).run(graph_module.graph)
    for node in list(annotated_nodes(graph_module.graph, adapter.name)):
        annotation = annotation_of(node) or {}
        if "beside" not in annotation:
            owner, _, attribute = annotation["owns"].rpartition(".")
            graph_module.get_submodule(owner)._parameters[attribute] = graph_module.get_parameter(str(node.target))
            node.target = annotation["owns"]
        remove_annotation(node)
    graph_module = fx.GraphModule(
        graph_module, graph_module.graph, "MergedGraph"
    )  # drops attributes that the graph no longer reads
    tree = dataclasses.replace(merged.tree, parameters={**merged.tree.parameters, **settled})
    return merged.with_graph(graph_module, tree)


def is_tied_outside(parameter: Any, module: str, tree: ModuleTree) -> bool:
    """Return whether a module's parameter is also held outside the module, as a tied head is."""
    holders = (tree.canonical(name.rpartition(".")[0]) for name in tree.names_of(parameter))
    return not all(is_within(holder, module) for holder in holders)


def is_inside(node: fx.Node, module: str, tree: ModuleTree) -> bool:
    """Return whether a node belongs to a module's own forward."""
    paths = [tree.canonical(path) for path, _ in module_stack(node)]
    return any(is_within(path, module) for path in paths)
