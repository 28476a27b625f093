"""Copying of graphs and removal of nodes."""

from __future__ import annotations

from torch import fx

from gralora_fx.compat.torch_graphs import convention_of, set_convention


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
