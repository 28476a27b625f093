"""Copying of graphs, removal of nodes, and annotations of the nodes that a pass created.

An annotation is in `node.meta["custom"]["gralora"]`, which copies and re-exports keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from gralora_fx.base.compat.torch_graphs import convention_of, set_convention

_KEY = "gralora"


def copy_graph(graph_module: fx.GraphModule) -> fx.Graph:
    """A copy of a graph with the node names, metadata and calling convention of the original."""
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


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase an unused node, and its inputs that become unused; placeholders stay."""
    erased, waiting = set(), [node]
    while waiting:
        unread = waiting.pop()
        if unread not in erased and not unread.users and unread.op != "placeholder":
            waiting += unread.all_input_nodes
            graph.erase_node(unread)
            erased.add(unread)


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """The module whose tensors and submodules a graph names."""
    assert graph.owning_module is not None
    return graph.owning_module


def annotate(node: fx.Node, **fields: Any) -> None:
    """Annotate a node with the site and the adapter it belongs to."""
    node.meta.setdefault("custom", {})[_KEY] = fields


def annotation_of(node: fx.Node) -> dict[str, Any] | None:
    """The annotation of a node, or None if no pass created it."""
    fields: dict[str, Any] | None = node.meta.get("custom", {}).get(_KEY)
    return fields


def remove_annotation(node: fx.Node) -> None:
    """Remove a node's annotation."""
    notes = node.meta.get("custom", {})
    notes.pop(_KEY, None)
    if not notes:
        node.meta.pop("custom", None)


def annotated_nodes(graph: fx.Graph, adapter: str) -> Iterator[fx.Node]:
    """The nodes that belong to an adapter, in graph order."""
    for node in graph.nodes:
        fields = annotation_of(node)
        if fields is not None and fields["adapter"] == adapter:
            yield node
