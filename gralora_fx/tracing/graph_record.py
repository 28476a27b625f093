"""A graph module as data that pickle can write and that gives the same graph back, node for node.

`fx.GraphModule` pickles its code alone, and is traced again where it is read: that fails for exported graphs, and loses
what nodes note of their modules, sites and modes.
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

from gralora_fx.compat import pytree
from gralora_fx.compat.calling_convention import convention_of, set_convention
from gralora_fx.compat.operators import HigherOrderOperator, OpOverload, OpOverloadPacket
from gralora_fx.errors import TraceError
from gralora_fx.graph.surgery import copy_graph

_TABLES = ("training", "_parameters", "_buffers", "_non_persistent_buffers_set")
_KEPT = ("custom", "stack_trace")  # of a node's notes; shapes are those of one trace, in a form that cannot be written


@dataclass(frozen=True)
class _Reference:
    """A node, as an argument of another."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator of `torch.ops`, as the path to it."""

    path: tuple[str, ...]


@dataclass(frozen=True)
class _NodeRecord:
    """A node, its arguments that are nodes replaced by references."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    type: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Spec:
    """A structure of inputs or outputs; that of torch warns of itself when it is pickled."""

    type: Any
    context: Any
    children: tuple[_Spec, ...]

    @classmethod
    def of(cls, spec: pytree.TreeSpec) -> _Spec:
        if spec.is_leaf():
            return cls(None, None, ())
        return cls(spec.type, spec.context, tuple(map(cls.of, spec.children())))

    def spec(self) -> pytree.TreeSpec:
        if self.type is None:
            return pytree.treespec_leaf()
        if self.type not in pytree.SUPPORTED_NODES:
            _register(self.type)
        return pytree.TreeSpec(self.type, self.context, [child.spec() for child in self.children])


@dataclass(frozen=True)
class _CallingConvention:
    """How the code of a graph takes its inputs and gives its outputs."""

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
        made: Any = object.__new__(self.kind)
        made.__dict__.update(self.attributes)
        if self.info is not None:
            kind, arguments, inputs, outputs = self.info
            made.pytree_info = kind(arguments, inputs.spec(), None if outputs is None else outputs.spec())
        return made


@dataclass(frozen=True)
class GraphRecord:
    """A graph: its nodes in order, and how it takes inputs and gives outputs."""

    nodes: tuple[_NodeRecord, ...]
    convention: _CallingConvention

    @classmethod
    def of(cls, graph: fx.Graph) -> GraphRecord:
        """Write a graph down.

        Raises:
            TraceError: A node calls a function that no module has under its name.
        """
        return cls(tuple(_record(node) for node in graph.nodes), _CallingConvention.of(convention_of(graph)))

    def graph(self) -> fx.Graph:
        """The graph again."""
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}

        def read(argument: Any) -> Any:
            return made[argument.name] if isinstance(argument, _Reference) else argument

        for record in self.nodes:
            args, kwargs = map_aggregate(record.args, read), map_aggregate(record.kwargs, read)
            target = _operator_at(record.target) if isinstance(record.target, _Operator) else record.target
            node = graph.create_node(record.op, target, args, kwargs, record.name, record.type)
            node.meta = dict(record.meta)
            made[record.name] = node
        set_convention(graph, self.convention.codegen())
        return graph


class PackedModule(nn.Module):
    """A graph module, or a module with graph modules within it, in a form that pickle can write."""

    def __init__(self, graph: GraphRecord, class_name: str, others: dict[str, Any]) -> None:
        """Put a record in the place of a graph module, whose tensors and modules the caller adds."""
        super().__init__()
        self.graph = graph
        self.class_name = class_name
        self.others = others


def packed(module: nn.Module) -> nn.Module:
    """A module, over the same tensors, in which every graph module is a record.

    Raises:
        TraceError: A graph calls a function that no module has under its name.
    """
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
    result.__dict__["_modules"] = {k: None if m is None else packed(m) for k, m in module._modules.items()}
    return result


def unpacked(module: nn.Module) -> nn.Module:
    """What `packed` was given, of what it returned, or of a copy."""
    for name, child in module._modules.items():
        module._modules[name] = None if child is None else unpacked(child)
    if not isinstance(module, PackedModule):
        return module
    return _graph_module(module, module.others, module.graph.graph(), module.class_name)


def deep_copy(graph_module: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """A copy with tensors and modules of its own, and the same nodes with all that they note.

    Args:
        graph_module: The module to copy.
        memo: What was copied already, as `copy.deepcopy` keeps it.
    """
    root = nn.Module()
    for table in (*_TABLES, "_modules"):
        root.__dict__[table] = graph_module.__dict__[table]
    root, others = copy.deepcopy((root, _plain_attributes(graph_module)), memo)
    return _graph_module(root, others, copy_graph(graph_module), type(graph_module).__name__)


def _graph_module(root: nn.Module, others: Mapping[str, Any], graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """A graph module of the tables of a module, and of values that are in none of them."""
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

    target: Any = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        target = _Operator(tuple(str(target).split(".")))
    elif isinstance(target, HigherOrderOperator):
        target = _Operator(("higher_order", str(target.__name__)))
    elif node.op == "call_function":
        _check_function(node, target)
    meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    if "custom" in meta:
        meta["custom"] = dict(meta["custom"])
    if "nn_module_stack" in node.meta:
        meta["nn_module_stack"] = {key: _named(entry) for key, entry in node.meta["nn_module_stack"].items()}
    args, kwargs = fx.map_arg(node.args, write), fx.map_arg(dict(node.kwargs), write)
    return _NodeRecord(node.op, node.name, target, args, kwargs, node.type, meta)


def _named(entry: Any) -> Any:
    """An entry of a module stack with the name of its class, which may be a local one."""
    if not isinstance(entry, tuple) or not isinstance(entry[1], type):
        return entry
    return entry[0], f"{entry[1].__module__}.{entry[1].__qualname__}", *entry[2:]


def _check_function(node: fx.Node, function: Callable[..., Any]) -> None:
    """Refuse a function that pickle would not find again."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if "<locals>" in name or "<lambda>" in name:
        raise TraceError(
            f"node {node.name!r} calls {name}, which is defined within a function, so the graph cannot be saved; "
            "define it at the top of a module"
        )


def _operator_at(operator: _Operator) -> Any:
    importlib.import_module("gralora_fx.tracing.trace")  # it registers every operator of this project
    found: Any = torch.ops
    try:
        for part in operator.path:
            found = getattr(found, part)
    except AttributeError as error:
        name = ".".join(operator.path)
        raise TraceError(
            f"the graph calls the operator {name}, which is not registered; import what defines it"
        ) from error
    return found


def _register(kind: type) -> None:
    """Let torch take a class apart that the graph takes or gives, in a process that has traced nothing."""
    if not issubclass(kind, Cache):
        raise TraceError(
            f"the graph takes or gives a {kind.__name__}, which is not registered with torch.utils._pytree here; "
            "import what registers it"
        )
    importlib.import_module("gralora_fx.compat.transformers_exporters").register_cache(kind)


def _plain_attributes(module: fx.GraphModule) -> dict[str, Any]:
    """What a graph reads that is neither a parameter, a buffer nor a module, by path."""
    found: dict[str, Any] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        holder = module.get_submodule(owner)
        if not any(name in holder.__dict__[table] for table in ("_parameters", "_buffers", "_modules")):
            found[str(node.target)] = getattr(holder, name)
    return found
