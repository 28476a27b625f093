"""An adapter's subgraph at every call of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from gralora_fx.errors import RewriteError
from gralora_fx.graph.annotations import annotate
from gralora_fx.graph.pipeline import PassResult
from gralora_fx.graph.sites import LinearCall, LinearSite, calls_at
from gralora_fx.graph.subgraph_calls import replace_operand
from gralora_fx.methods import AdapterDims, AdapterMethod


class Insertion(NamedTuple):
    """An adapter at one site.

    Attributes:
        site: The site, found in the graph or one it was copied from.
        names: Attribute paths of the adapter's tensors in the graph module, by field of the method's named tuple.
        dims: The adapter's sizes.
        scale: Factor of its output.
        dtype: The adapter's dtype where it differs from the layer's.
    """

    site: LinearSite
    names: Mapping[str, str]
    dims: AdapterDims
    scale: float
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class InsertAdapter:
    """Add an adapter's output to that of its sites, at each of their calls.

    Before: `y = linear(x, w, b); z = relu(y)`
    After:  `y = linear(x, w, b); ...; y_1 = reshape_as(accumulate(blocks of y, ...), y); z = relu(y_1)`

    The nodes are those that `AdapterMethod.add_output` makes when it runs on the graph's own proxies.

    Attributes:
        adapter: Name of the adapter.
        method: Its method.
        insertions: Its sites.
        dropout: Dropout probability of its input.
    """

    adapter: str
    method: AdapterMethod
    insertions: tuple[Insertion, ...]
    dropout: float = 0.0

    def __call__(self, graph_module: fx.GraphModule) -> PassResult[fx.GraphModule]:
        """Insert it.

        Raises:
            RewriteError: A call of a site is no longer in the graph, or is not a linear call any more.
        """
        by_name = {node.name: node for node in graph_module.graph.nodes}
        count = 0
        for insertion in self.insertions:
            for name in insertion.site.calls:
                for call in _calls(by_name, name, insertion.site):
                    self._insert(graph_module.graph, call, insertion)
                    count += 1
        return PassResult(count)

    def _insert(self, graph: fx.Graph, call: LinearCall, insertion: Insertion) -> None:
        site = insertion.site
        sizes = {
            "scale": insertion.scale,
            "features": (site.in_features, site.out_features),
            "dims": insertion.dims,
        }
        if call.operand is not None:
            added = _insert_into_operand(graph, call, self.method, insertion.names, **sizes)
        else:
            options = {**sizes, "dropout": self.dropout, "dtype": insertion.dtype}
            added = _insert_at(graph, call, self.method, insertion.names, **options)
        for node in added:
            annotate(node, site=site.path, adapter=self.adapter, call=call.node.name)
            if "nn_module_stack" in call.node.meta:
                node.meta["nn_module_stack"] = call.node.meta["nn_module_stack"]


def _calls(by_name: Mapping[str, fx.Node], name: str, site: LinearSite) -> tuple[LinearCall, ...]:
    """The calls of a site at a node."""
    node = by_name.get(name)
    calls = () if node is None else tuple(calls_at(node, site))
    if not calls:
        raise RewriteError(
            f"{site.path}: node {name!r} is not a linear call of this graph any more; trace the model again"
        )
    return calls


def _insert_at(
    graph: fx.Graph, call: LinearCall, method: AdapterMethod, names: Mapping[str, str], **options: Any
) -> list[fx.Node]:
    node, after, tracer = call.node, call.node.next, GraphAppendingTracer(graph)
    with graph.inserting_before(after):
        tensors = {
            field: _proxy(graph.create_node("get_attr", attribute), tracer) for field, attribute in names.items()
        }
        x, y = _proxy(call.input, tracer), _proxy(node, tracer)
        result: Any = method.add_output(x, y, method.tensors(**tensors), rows=call.rows, **options)
    inserted: list[fx.Node] = []
    while (candidate := inserted[-1].next if inserted else node.next) is not after:
        inserted.append(candidate)
    members = set(inserted)
    node.replace_all_uses_with(result.node, delete_user_cb=lambda user: user not in members)
    return inserted


def _insert_into_operand(
    graph: fx.Graph, call: LinearCall, method: AdapterMethod, names: Mapping[str, str], **options: Any
) -> list[fx.Node]:
    """Add an adapter's update to the weight passed to a branch or a loop.

    Before: `y = cond(p, self.true, self.false, (x, w))`
    After:  `...; w_1 = add(w, update); y = cond(p, self.true, self.false, (x, w_1))`
    """
    before, tracer = set(graph.nodes), GraphAppendingTracer(graph)
    with graph.inserting_before(call.node):
        tensors = {field: _proxy(graph.get_attr(attribute), tracer) for field, attribute in names.items()}
        result: Any = method.add_update(_proxy(call.weight, tracer), method.tensors(**tensors), **options)
    assert call.operand is not None
    replace_operand(call.node, call.operand, result.node)
    return [candidate for candidate in graph.nodes if candidate not in before]


def _proxy(node: fx.Node, tracer: GraphAppendingTracer) -> Tensor:
    return fx.Proxy(node, tracer)  # type: ignore[return-value]  # a proxy stands for a tensor
