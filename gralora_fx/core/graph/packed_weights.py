"""Weights that are computed when a graph reads them: unpacked from few bits in memory, or read from a file.

Each is a lazy parameter in a model's graph, and a node that computes its values in the graph that runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from gralora_fx.base.sources.lazy_tensors import is_lazy, raw_values_of, source_of
from gralora_fx.base.sources.reused_memory import READ
from gralora_fx.core.graph.linear_calls import mark_unpacked
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.graph.surgery import copy_graph, copy_in_mode, parameter_tree

_PREFIX = "packed"  # of the buffers of a layer


class PackedWeight(ABC):
    """The source of a lazy parameter whose values are packed in memory."""

    # the packed data by name; integers only, so that no conversion of a model changes them
    tensors: Mapping[str, Tensor]

    @abstractmethod
    def unpacked(self, tensors: Mapping[str, Any]) -> Any:
        """Return the values in the parameter's shape; given a graph's proxies, the node that computes them."""

    def __call__(self) -> Tensor:
        """Return the values in new memory."""
        values: Tensor = self.unpacked(self.tensors)
        return values


@dataclass(frozen=True, eq=False)
class StreamedWeight:
    """Computes the values of a lazy parameter that has nothing in memory; a node of a graph calls it."""

    parameter: nn.Parameter
    name: str  # for messages
    dtype: torch.dtype | None = None  # of the values; None for the parameter's
    __name__ = "streamed_weight"

    def __call__(self) -> Tensor:
        """Return the values in memory that is their own while they are used, or memory-mapped."""
        return READ.cast(raw_values_of(self.parameter, self.name), self.dtype or self.parameter.dtype)


@dataclass(frozen=True, eq=False)
class StreamedRows:
    """Computes the rows of a lazy table that are looked up."""

    parameter: nn.Parameter
    name: str  # for messages
    __name__ = "streamed_rows"

    def __call__(self, ids: Tensor) -> Tensor:
        """Return a table in which the rows of these ids are set."""
        from gralora_fx.base.sources.table_rows import looked_up

        return looked_up(raw_values_of(self.parameter, self.name), ids, self.parameter.dtype)


def packed_of(parameter: object) -> PackedWeight | None:
    """Return the packed source of a parameter; None if it is not packed."""
    source = source_of(parameter)
    return source if isinstance(source, PackedWeight) else None


def computed_parameters(module: nn.Module) -> dict[str, PackedWeight | StreamedWeight]:
    """Return a module's packed and streamed parameters by name."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: packed_of(each) or StreamedWeight(each, name) for name, each in named if is_lazy(each)}


def hold_packed(root: nn.Module) -> None:
    """Replace the packed parameters in a tree's modules by buffers."""
    for name, parameter in list(root.named_parameters(remove_duplicate=False)):
        packed = packed_of(parameter)
        if packed is None:
            continue
        owner, _, key = name.rpartition(".")
        module = root.get_submodule(owner)
        del module._parameters[key]
        for part, tensor in packed.tensors.items():
            module.register_buffer(_buffer(key, part), tensor)


def _buffer(key: str, part: str) -> str:
    return f"{_PREFIX}_{key}_{part}"


@dataclass(frozen=True)
class ComputeWeights:
    """Compute packed and streamed weights in a graph just before they are read.

    Before: `w = self.fc.weight; ...; y = linear(x, w)`
    After:  `c = self.fc.packed_weight_codes; ...; w = dequantize(c, ...); y = linear(x, w)`
    or:     `...; w = streamed_weight(); y = linear(x, w)`, for each reader again, so that none waits in memory
    or:     `...; w = streamed_rows(ids); y = embedding(w, ids)`
    """

    computed: Mapping[str, PackedWeight | StreamedWeight]  # the weights by their names in the graph
    others: Collection[str] = ()  # names of weights that the graph reads directly, since they were replaced

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Compute the weights."""
        changed = 0
        for node in graph.find_nodes(op="get_attr"):
            weight = self.computed.get(str(node.target))
            if weight is None or node.target in self.others:
                continue
            if isinstance(weight, StreamedWeight):
                _stream(weight, node)
            else:
                _unpack(weight, node)
            graph.erase_node(node)
            changed += 1
        return PassResult(changed)


def _stream(weight: StreamedWeight, node: fx.Node) -> None:
    for user in list(node.users):
        read: tuple[Any, ...] = (weight,)
        if user.target is torch.ops.aten.embedding.default and user.args[0] is node:
            read = StreamedRows(weight.parameter, weight.name), (user.args[1],)
        with node.graph.inserting_before(user):
            values = node.graph.call_function(*read)
        _describe(values, node, user)
        user.replace_input_with(node, values)


def _unpack(weight: PackedWeight, node: fx.Node) -> None:
    graph = node.graph
    first = next((user for user in _after(node) if user in node.users), None)
    if first is None:
        return
    before, tracer = set(graph.nodes), GraphAppendingTracer(graph)
    owner, _, key = str(node.target).rpartition(".")
    with graph.inserting_before(first):
        names = {part: f"{owner}.{_buffer(key, part)}".lstrip(".") for part in weight.tensors}
        proxies = {part: fx.Proxy(graph.get_attr(name), tracer) for part, name in names.items()}
        values = weight.unpacked(proxies).node
    for made in graph.nodes:
        if made not in before:
            _place(made, first)
    _describe(values, node, first)
    node.replace_all_uses_with(values)


def _describe(values: fx.Node, node: fx.Node, user: fx.Node) -> None:
    """Describe a node with a weight's values as the weight is, in the block of its reader."""
    _place(values, user)
    mark_unpacked(values, str(node.target))
    values.meta["val"] = node.meta.get("val")


def _place(made: fx.Node, user: fx.Node) -> None:
    if "nn_module_stack" in user.meta:
        made.meta["nn_module_stack"] = user.meta["nn_module_stack"]


def _after(node: fx.Node) -> Any:
    while (node := node.next).op != "root":
        yield node


def runnable(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that computes its packed and streamed weights, built once; the graph itself without any."""
    made: tuple[fx.Graph, bool, fx.GraphModule] | None = graph_module.__dict__.get("_gralora_runnable")
    if made is not None and made[:2] == (graph_module.graph, graph_module.training):
        return made[2]
    computed = computed_parameters(graph_module)
    if not computed:
        return graph_module
    copied = fx.GraphModule(graph_module, copy_graph(graph_module), "Copied")
    tree = parameter_tree(copied)
    hold_packed(tree)
    graph = copy_graph(graph_module)
    ComputeWeights(computed)(graph)
    result = copy_in_mode(tree, graph, graph_module.training, "UnpackedGraph")
    graph_module.__dict__["_gralora_runnable"] = (graph_module.graph, graph_module.training, result)
    return result
