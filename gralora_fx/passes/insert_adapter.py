"""Insert an adapter's subgraph at every call of a site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from gralora_fx.errors import RewriteError
from gralora_fx.graph.annotations import annotate
from gralora_fx.graph.sites import LinearCall, LinearSite, calls_at
from gralora_fx.graph.subgraph_calls import replace_operand
from gralora_fx.methods import AdapterDims, AdapterMethod


def insert_adapter(
    graph_module: fx.GraphModule,
    site: LinearSite,
    adapter: str,
    names: Mapping[str, str],
    *,
    method: AdapterMethod,
    dims: AdapterDims,
    scale: float,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    nodes: Mapping[str, fx.Node] | None = None,
) -> tuple[fx.Node, ...]:
    """Add an adapter's output to a site's, at each of its calls.

    Before: `y = linear(x, w, b); z = relu(y)`
    After:  `y = linear(x, w, b); ...; y_1 = reshape_as(accumulate(blocks of y, ...), y); z = relu(y_1)`

    The nodes are those that `AdapterMethod.add_output` makes when it runs on the graph's own proxies.

    Args:
        graph_module: The graph; it must be recompiled afterwards.
        site: The site, found in this graph or one it was copied from.
        adapter: Name of the adapter.
        names: Attribute paths of the adapter's tensors in `graph_module`, by field of the method's
            named tuple.
        method: The adapter's method.
        dims: The adapter's sizes.
        scale: Factor of its output.
        dropout: Dropout probability of its input.
        dtype: The adapter's dtype where it differs from the layer's.
        nodes: The graph's nodes by name, if known already.

    Returns:
        The nodes inserted.

    Raises:
        RewriteError: A call of the site is no longer in the graph, or is not a linear call any more.
    """
    graph = graph_module.graph
    by_name = {node.name: node for node in graph.nodes} if nodes is None else nodes
    inserted: list[fx.Node] = []
    for name in site.calls:
        node = by_name.get(name)
        calls = () if node is None else calls_at(node, site)
        if not calls:
            raise RewriteError(
                f"{site.path}: node {name!r} is not a linear call of this graph any more; trace the model again"
            )
        for call in calls:
            sizes = {"scale": scale, "features": (site.in_features, site.out_features), "dims": dims}
            if call.operand is not None:
                added = _insert_into_operand(graph, call, method, names, **sizes)
            else:
                added = _insert_at(graph, call, method, names, **sizes, dropout=dropout, dtype=dtype)
            for candidate in added:
                annotate(candidate, site=site.path, adapter=adapter, call=call.node.name)
                if "nn_module_stack" in call.node.meta:
                    candidate.meta["nn_module_stack"] = call.node.meta["nn_module_stack"]
            inserted += added
    return tuple(inserted)


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
