"""Graph modules as picklable records, from which the same graph is rebuilt node for node.

`fx.GraphModule` pickles only its code and is traced again on loading, which fails for exported graphs and loses the
nodes' metadata on modules, sites and modes.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from transformers import Cache

from gralora_fx.base.compat.torch_graphs import (
    SUPPORTED_NODES,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    TreeSpec,
    convention_of,
    name_keywords,
    set_convention,
    tree_leaves,
    treespec_leaf,
)
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.operators import NAMESPACE, define_operators
from gralora_fx.errors import TraceError, an

_TABLES = ("training", "_parameters", "_buffers", "_non_persistent_buffers_set")
_KEPT = ("custom", "stack_trace")  # of a node's metadata; traced values cannot be pickled


@dataclass(frozen=True)
class _Reference:
    """A node as an argument of another node."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator of `torch.ops`, by its path."""

    path: tuple[str, ...]


@dataclass(frozen=True)
class _NodeRecord:
    """A node, with references in place of its node arguments."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    type: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Spec:
    """A pytree spec; torch's own warns when it is pickled."""

    type: Any
    context: Any
    children: tuple[_Spec, ...]

    @classmethod
    def of(cls, spec: TreeSpec) -> _Spec:
        if spec.is_leaf():
            return cls(None, None, ())
        return cls(spec.type, spec.context, tuple(map(cls.of, spec.children())))

    def spec(self) -> TreeSpec:
        if self.type is None:
            return treespec_leaf()
        if self.type not in SUPPORTED_NODES:
            _register(self.type)
        return TreeSpec(self.type, self.context, [child.spec() for child in self.children])


@dataclass(frozen=True)
class _CallingConvention:
    """The signature and the pytree specs of a graph's code."""

    kind: Any
    attributes: dict[str, Any]
    info: tuple[Any, Any, _Spec, _Spec | None] | None

    @classmethod
    def of(cls, codegen: Any) -> _CallingConvention:
        attributes = {key: value for key, value in vars(codegen).items() if key != "pytree_info"}
        info = getattr(codegen, "pytree_info", None)
        if info is None:
            return cls(type(codegen), attributes, None)
        out = None if info.out_spec is None else _Spec.of(info.out_spec)
        return cls(type(codegen), attributes, (type(info), info.orig_args, _Spec.of(info.in_spec), out))

    def codegen(self) -> Any:
        generator: Any = object.__new__(self.kind)
        generator.__dict__.update(self.attributes)
        if self.info is not None:
            kind, arguments, inputs, outputs = self.info
            generator.pytree_info = kind(arguments, inputs.spec(), None if outputs is None else outputs.spec())
        return generator


@dataclass(frozen=True)
class GraphRecord:
    """A graph: its nodes in order, and its calling convention."""

    nodes: tuple[_NodeRecord, ...]
    convention: _CallingConvention

    @classmethod
    def of(cls, graph: fx.Graph) -> GraphRecord:
        """Record a graph."""
        return cls(tuple(_record(node) for node in graph.nodes), _CallingConvention.of(convention_of(graph)))

    def graph(self) -> fx.Graph:
        """Rebuild the graph."""
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        name_keywords(record.target for record in self.nodes if isinstance(record.target, str))

        def read(argument: Any) -> Any:
            return nodes[argument.name] if isinstance(argument, _Reference) else argument

        for record in self.nodes:
            args, kwargs = map_aggregate(record.args, read), map_aggregate(record.kwargs, read)
            node = graph.create_node(record.op, loaded_target(record.target), args, kwargs, record.name, record.type)
            node.meta = dict(record.meta)
            nodes[record.name] = node
        set_convention(graph, self.convention.codegen())
        return graph


class PackedModule(nn.Module):
    """The picklable form of a graph module."""

    def __init__(self, graph: GraphRecord, class_name: str, others: dict[str, Any]) -> None:
        """Store a record; the caller adds the tensors and modules."""
        super().__init__()
        self.graph = graph
        self.class_name = class_name
        self.others = others


def pack_module(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree over the same tensors, with every graph module replaced by its record."""
    if not any(isinstance(inner, fx.GraphModule) for inner in module.modules()):
        return module
    result: nn.Module
    if isinstance(module, fx.GraphModule):
        result = PackedModule(GraphRecord.of(module.graph), type(module).__name__, _plain_attributes(module))
        for table in _TABLES:
            result.__dict__[table] = module.__dict__[table]
    else:
        result = object.__new__(type(module))
        result.__dict__.update(module.__dict__)
    result.__dict__["_modules"] = {k: None if m is None else pack_module(m) for k, m in module._modules.items()}
    return result


def unpack_module(module: nn.Module) -> nn.Module:
    """Undo `pack_module`, on its result or a copy of it."""
    for name, child in module._modules.items():
        module._modules[name] = None if child is None else unpack_module(child)
    if not isinstance(module, PackedModule):
        return module
    return _graph_module(module, module.others, module.graph.graph(), module.class_name)


def deep_copy(graph_module: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """Return a copy with its own tensors and modules, and the same nodes with their metadata."""
    root = nn.Module()
    for table in (*_TABLES, "_modules"):
        root.__dict__[table] = graph_module.__dict__[table]
    root, others = copy.deepcopy((root, _plain_attributes(graph_module)), memo)
    return _graph_module(root, others, copy_graph(graph_module), type(graph_module).__name__)


def _graph_module(root: nn.Module, others: Mapping[str, Any], graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """Build a graph module from a module's tables and from attributes outside them."""
    result = fx.GraphModule(nn.Module(), fx.Graph(), class_name)
    for table in (*_TABLES, "_modules"):
        result.__dict__[table] = root.__dict__[table]
    for name, value in others.items():
        owner, _, attribute = name.rpartition(".")
        setattr(result.get_submodule(owner), attribute, value)
    result.graph = graph
    return result


def _record(node: fx.Node) -> _NodeRecord:
    def write(argument: fx.Node) -> Any:
        return _Reference(argument.name)

    args, kwargs = fx.map_arg(node.args, write), fx.map_arg(dict(node.kwargs), write)
    target = saved_target(node.op, node.name, node.target)
    return _NodeRecord(node.op, node.name, target, args, kwargs, node.type, saved_meta(node))


def saved_target(op: str, name: str, target: Any) -> Any:
    """Return a node's target as pickle takes it: operators by their path."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return _Operator(tuple(str(target).split(".")))
    if isinstance(target, HigherOrderOperator):
        return _Operator(("higher_order", str(target.__name__)))
    if op == "call_function":
        for part in (target, *tree_leaves(getattr(target, "arguments", ()))):  # a hook of a kept call too
            _check_function(name, part)
    return target


def loaded_target(target: Any) -> Any:
    """Return the target that `saved_target` was given."""
    return _operator_at(target) if isinstance(target, _Operator) else target


def saved_meta(node: Any) -> dict[str, Any]:
    """Return the part of a node's, or its record's, metadata that pickle takes."""
    meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    if "custom" in meta:
        meta["custom"] = dict(meta["custom"])
    if "nn_module_stack" in node.meta:
        meta["nn_module_stack"] = {key: _named(entry) for key, entry in node.meta["nn_module_stack"].items()}
    return meta


def _named(entry: Any) -> Any:
    """Return a module stack's entry with the class's name in place of the class, which may be local."""
    if not isinstance(entry, tuple) or not isinstance(entry[1], type):
        return entry
    return entry[0], f"{entry[1].__module__}.{entry[1].__qualname__}", *entry[2:]


def _check_function(node: str, function: Callable[..., Any]) -> None:
    """Raise if pickle cannot find a function, or an object's class, by its name."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if "<locals>" in name or "<lambda>" in name:
        raise TraceError(
            f"node {node!r} calls {name}, which is defined within a function, so the graph cannot be saved; "
            "define it at the top of a module"
        )


def _operator_at(operator: _Operator) -> Any:
    if operator.path[0] == NAMESPACE:
        define_operators("::".join(operator.path[:2]))  # in a process that traced nothing
    target: Any = torch.ops
    try:
        for part in operator.path:
            target = getattr(target, part)
    except AttributeError as error:
        name = ".".join(operator.path)
        raise TraceError(
            f"the graph calls the operator {name}, which is not registered; import what defines it"
        ) from error
    return target


def _register(kind: type) -> None:
    """Register a class of inputs or outputs with pytree, in a process that has not traced yet."""
    if not issubclass(kind, Cache):
        raise TraceError(
            f"the graph takes or gives {an(kind.__name__)}, which is not registered with torch.utils._pytree here; "
            "import what registers it"
        )
    importlib.import_module("gralora_fx.base.compat.transformers_exporters").register_cache(kind)


def _plain_attributes(module: fx.GraphModule) -> dict[str, Any]:
    """Return the attributes that a graph reads other than parameters, buffers and modules, by path."""
    attributes: dict[str, Any] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        holder = module.get_submodule(owner)
        if not any(name in holder.__dict__[table] for table in ("_parameters", "_buffers", "_modules")):
            attributes[str(node.target)] = getattr(holder, name)
    return attributes
