"""Copies of graphs and of module trees, overlays of trees, and annotations of the nodes that a pass created.

An annotation is in `node.meta["custom"]["gralora"]`, which copies and re-exports keep. An overlay shares the tree's
tables of tensors, but a replacement in one of them does not show in the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy as shallow_copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import TreeSpec, convention_of, set_convention, tree_flatten, tree_info
from gralora_fx.base.sources.lazy_tensors import source_of, with_source

TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
_KEY = "gralora"


def copy_graph(graph_module: fx.GraphModule) -> fx.Graph:
    """Return a copy of a graph with the original's node names, metadata and calling convention."""
    copy = fx.Graph(tracer_cls=getattr(graph_module, "_tracer_cls", None))
    val_map: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph_module.graph, val_map)
    original_output = next(iter(reversed(graph_module.graph.nodes)))
    node = copy.output(output, type_expr=original_output.type)
    node.meta = dict(original_output.meta)
    for old, new in val_map.items():
        new.meta = {**old.meta, "custom": dict(old.meta["custom"])} if "custom" in old.meta else dict(old.meta)
    set_convention(copy, convention_of(graph_module.graph))
    return copy


def copied(graph_module: fx.GraphModule, class_name: str) -> fx.GraphModule:
    """Return a copy of a graph module over the same tensors, whose modules can get others."""
    copy = fx.GraphModule(graph_module, copy_graph(graph_module), class_name)
    copy.__dict__.update(own_tables(copy, {}))
    return copy


def own_tables(module: nn.Module, copies: dict[int, nn.Module]) -> dict[str, Any]:
    """Return copies of a module's tables, with copies of its submodules, which are noted by their ids."""
    tables: dict[str, Any] = {table: shallow_copy(module.__dict__[table]) for table in TABLES}
    for name, child in module._modules.items():
        if child is not None:
            tables["_modules"][name] = own = object.__new__(type(child))
            own.__dict__.update({**child.__dict__, **own_tables(child, copies)})
            copies[id(own)] = own
    return tables


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase an unused node, and its inputs that become unused; placeholders stay."""
    erased, waiting = set(), [node]
    while waiting:
        unread = waiting.pop()
        if unread not in erased and not unread.users and unread.op != "placeholder":
            waiting += unread.all_input_nodes
            graph.erase_node(unread)
            erased.add(unread)


def add_tuple_input(graph: fx.Graph, name: str, count: int) -> list[fx.Node]:
    """Add an input to a graph, a tuple of `count` values, and return the node of each."""
    placeholders = graph.find_nodes(op="placeholder")
    with graph.inserting_after(placeholders[-1]):
        added = [graph.placeholder(f"{name}_{index}") for index in reversed(range(count))][::-1]
    convention, info = shallow_copy(convention_of(graph)), tree_info(graph)
    args, kwargs = info.in_spec.children()
    names, specs = [*kwargs.context, name], [*kwargs.children(), tree_flatten(tuple(added))[1]]
    in_spec = TreeSpec(tuple, None, [args, TreeSpec(dict, names, specs)])
    convention.pytree_info = info._replace(orig_args=[*info.orig_args, name], in_spec=in_spec)
    set_convention(graph, convention)
    return added


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """Return the module that a graph's attribute and module names refer to."""
    assert graph.owning_module is not None
    return graph.owning_module


def annotate(node: fx.Node, **fields: Any) -> None:
    """Annotate a node with its site and its adapter."""
    node.meta.setdefault("custom", {})[_KEY] = fields


def annotation_of(node: fx.Node) -> dict[str, Any] | None:
    """Return the annotation of a node; None if no pass created it."""
    fields: dict[str, Any] | None = node.meta.get("custom", {}).get(_KEY)
    return fields


def remove_annotation(node: fx.Node) -> None:
    """Remove a node's annotation."""
    notes = node.meta.get("custom", {})
    notes.pop(_KEY, None)
    if not notes:
        node.meta.pop("custom", None)


def annotated_nodes(graph: fx.Graph, adapter: str) -> Iterator[fx.Node]:
    """Yield the nodes of an adapter, in graph order."""
    for node in graph.nodes:
        fields = annotation_of(node)
        if fields is not None and fields["adapter"] == adapter:
            yield node


ROOT = "gralora"  # attribute of a tree, below which it has the adapters' tensors


class CountedGraph(fx.GraphModule):
    """A graph module that counts its compilations, so that edits of its graph are noticed."""

    compilations: int = 0  # the count

    def recompile(self) -> Any:
        """Compile the graph."""
        self.__dict__["compilations"] = self.compilations + 1
        return super().recompile()


class FlatGraph:
    """A graph module that is compiled when it is first read or run, and whose edits are counted."""

    def __init__(self, module: CountedGraph) -> None:
        self.module = module  # the graph module
        self._compilations = module.compilations
        self._is_compiled = False
        self._compiling = threading.Lock()

    def compiled(self) -> fx.GraphModule:
        """Return the graph module with its code."""
        with self._compiling:
            if not self._is_compiled:
                fx.GraphModule.recompile(self.module)  # without counting
                self._is_compiled = True
        return self.module

    @property
    def edits(self) -> int:
        """Number of recompilations since, as after edits."""
        return self.module.compilations - self._compilations


def parameter_tree(graph_module: fx.GraphModule) -> nn.Module:
    """Return a plain module with a graph module's tensors, layers and containers at the same paths."""
    tree = nn.Module()
    for table in TABLES:
        tree.__dict__[table] = graph_module.__dict__[table]
    for path in _called(graph_module.graph):
        replace_module(tree, path, _in_mode(tree.get_submodule(path)))
    return tree


def copy_in_mode(root: nn.Module, graph: fx.Graph, training: bool, class_name: str) -> fx.GraphModule:
    """Return a graph module over the tensors of a tree, with its own containers and mode."""
    graph_module = fx.GraphModule(root, graph, class_name)
    set_mode_of_modules(graph_module, training)
    return graph_module


def set_mode_of_modules(graph_module: fx.GraphModule, training: bool) -> None:
    """Set the mode of a graph module and of the modules that it calls, in copies that others do not share."""
    graph_module.training = training
    for path in _called(graph_module.graph):
        replace_module(graph_module, path, _in_mode(graph_module.get_submodule(path), training))


def overlay(tree: nn.Module, graph: fx.Graph, training: bool) -> CountedGraph:
    """Return a graph module over a tree's tensors, not compiled until its graph is complete.

    The graph sees replacements of tensors in the tree, but not an adapter's removal; the tree does not see tensors that
    `replace_parameters` puts into the result.
    """
    graph_module = CountedGraph(nn.Module(), fx.Graph(), "GraloraGraph")
    for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        graph_module.__dict__[table] = tree.__dict__[table]
    graph_module.__dict__["_modules"] = dict(tree._modules)
    graph_module.__dict__.update({name: value for name, value in vars(tree).items() if isinstance(value, torch.Tensor)})
    share_adapters(graph_module, tree)
    graph.owning_module = graph_module
    graph_module._graph = graph  # the public setter would compile it before it is complete
    set_mode_of_modules(graph_module, training)
    return graph_module


def share_adapters(graph_module: fx.GraphModule, tree: nn.Module) -> None:
    """Point a graph module's adapter tensors to those of a tree."""
    if (adapters := tree._modules.get(ROOT)) is not None:
        graph_module._modules[ROOT] = _shallow(adapters)
    else:
        graph_module._modules.pop(ROOT, None)


def replace_parameters(root: nn.Module, parameters: Mapping[str, Tensor], table: str = "_parameters") -> None:
    """Replace parameters (or buffers) of a tree by path; modules on the way are copied, since others may share them."""
    copied = {id(root)}
    for path, parameter in parameters.items():
        owner, _, attribute = path.rpartition(".")
        module = _own_container(root, owner, copied)
        module.__dict__[table] = {**module.__dict__[table], attribute: parameter}


def map_parameters(root: nn.Module, new: Callable[[nn.Parameter, str], nn.Parameter]) -> None:
    """Replace the parameters in modules; one at several places is converted once, so that tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # keys compare by identity
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = new(parameter, f"{path}.{name}".lstrip("."))
                module._parameters[name] = made[parameter]


@contextmanager
def placeholder_parameters(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Replace parameters on the meta device by placeholders within the block, for tracing: shapes over a single zero.

    Fake tensors would do as well, but fake parameters make `torch.export` corrupt memory, as seen with torch 2.13.
    """
    originals: dict[nn.Parameter, nn.Parameter] = {}

    def placeholder(parameter: nn.Parameter, _: str) -> nn.Parameter:
        if not parameter.is_meta:
            return parameter
        zero = torch.zeros((), dtype=parameter.dtype)
        placeholders = nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)
        originals[placeholders] = parameter
        source = source_of(parameter)  # which a comparison of the trace with the model reads
        return placeholders if source is None else with_source(placeholders, source)

    if not any(parameter.is_meta for parameter in model.parameters()):
        yield {}
        return
    map_parameters(model, placeholder)
    try:
        yield originals
    finally:
        restore_parameters(model, originals)


def restore_parameters(module: nn.Module, originals: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace placeholders in a module, such as a trace, by the model's own parameters."""
    map_parameters(module, lambda parameter, _: originals.get(parameter, parameter))


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path of a tree; modules on the way are copied, since others may share them."""
    owner, _, name = path.rpartition(".")
    _own_container(root, owner, {id(root)})._modules[name] = module


def container_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path of a tree, creating missing ones."""
    module = root
    for name in path.split(".") if path else ():
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def _in_mode(module: nn.Module, training: bool | None = None) -> nn.Module:
    """Return a copy of a module tree over the same tables of tensors, with its own mode."""
    copy = _shallow(module)
    copy.training = module.training if training is None else training
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _in_mode(child, training)
    return copy


def _called(graph: fx.Graph) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in graph.find_nodes(op="call_module")))


def _own_container(root: nn.Module, path: str, copied: set[int]) -> nn.Module:
    """Return the module at a path, copying each module on the way that is not in `copied`."""
    module = root
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None or id(child) not in copied:
            child = nn.Module() if child is None else _shallow(child)
            copied.add(id(child))
            module._modules[name] = child
        module = child
    return module


def _shallow(module: nn.Module) -> nn.Module:
    """Return a copy of a module with its own table of submodules, sharing the tables of tensors."""
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = dict(copy.__dict__["_modules"])
    return copy
