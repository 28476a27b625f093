"""Packed weights: a lazy parameter in a model's graph, and a node that unpacks it in the graph that runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from gralora_fx.base.sources.lazy_tensors import source_of
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


def packed_of(parameter: object) -> PackedWeight | None:
    """Return the packed source of a parameter; None if it is not packed."""
    source = source_of(parameter)
    return source if isinstance(source, PackedWeight) else None


def packed_parameters(module: nn.Module) -> dict[str, PackedWeight]:
    """Return a module's packed parameters by name."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: packed for name, parameter in named if (packed := packed_of(parameter)) is not None}


def hold_packed(root: nn.Module) -> None:
    """Replace the packed parameters in a tree's modules by buffers."""
    for name, packed in packed_parameters(root).items():
        owner, _, key = name.rpartition(".")
        module = root.get_submodule(owner)
        del module._parameters[key]
        for part, tensor in packed.tensors.items():
            module.register_buffer(_buffer(key, part), tensor)


def _buffer(key: str, part: str) -> str:
    return f"{_PREFIX}_{key}_{part}"


@dataclass(frozen=True)
class UnpackWeights:
    """Compute packed weights in a graph just before they are read.

    Before: `w = self.fc.weight; ...; y = linear(x, w)`
    After:  `c = self.fc.packed_weight_codes; ...; w = dequantize(c, ...); y = linear(x, w)`
    """

    packed: Mapping[str, PackedWeight]  # the packed weights by their names in the graph
    others: Collection[str] = ()  # names of weights that the graph reads directly, since they were replaced

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Unpack the weights."""
        changed, tracer = 0, GraphAppendingTracer(graph)
        for node in [node for node in graph.nodes if node.op == "get_attr"]:
            packed = self.packed.get(str(node.target))
            if packed is None or node.target in self.others:
                continue
            owner, _, key = str(node.target).rpartition(".")
            first = next((user for user in _after(node) if user in node.users), None)
            if first is not None:
                before = set(graph.nodes)
                with graph.inserting_before(first):
                    names = {part: f"{owner}.{_buffer(key, part)}".lstrip(".") for part in packed.tensors}
                    proxies = {part: fx.Proxy(graph.get_attr(name), tracer) for part, name in names.items()}
                    values = packed.unpacked(proxies).node
                for made in graph.nodes:
                    if made not in before and "nn_module_stack" in first.meta:
                        made.meta["nn_module_stack"] = first.meta["nn_module_stack"]
                mark_unpacked(values, str(node.target))
                values.meta["val"] = node.meta.get("val")
                node.replace_all_uses_with(values)
            graph.erase_node(node)
            changed += 1
        return PassResult(changed)


def _after(node: fx.Node) -> Any:
    while (node := node.next).op != "root":
        yield node


def runnable(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that computes its packed weights, built once; the graph itself if there are none."""
    made: tuple[fx.Graph, bool, fx.GraphModule] | None = graph_module.__dict__.get("_gralora_runnable")
    if made is not None and made[:2] == (graph_module.graph, graph_module.training):
        return made[2]
    packed = packed_parameters(graph_module)
    if not packed:
        return graph_module
    copied = fx.GraphModule(graph_module, copy_graph(graph_module), "Copied")
    tree = parameter_tree(copied)
    hold_packed(tree)
    graph = copy_graph(graph_module)
    UnpackWeights(packed)(graph)
    result = copy_in_mode(tree, graph, graph_module.training, "UnpackedGraph")
    graph_module.__dict__["_gralora_runnable"] = (graph_module.graph, graph_module.training, result)
    return result
