"""Take an adapter's subgraphs out of a graph; the layers' own outputs come back."""

from __future__ import annotations

from torch import fx

from gralora_fx.passes.marks import mark_of, marked_nodes


def remove_adapter(graph_module: fx.GraphModule, adapter: str) -> bool:
    """Undo what `insert_adapter` did for an adapter; other adapters stay.

    Before: `y = linear(x, w, b); ...; y_1 = reshape_as(accumulate(blocks of y, ...), y); z = relu(y_1)`
    After:  `y = linear(x, w, b); z = relu(y)`

    Args:
        graph_module: The graph; it must be recompiled afterwards.
        adapter: Name of the adapter.

    Returns:
        Whether the graph changed.
    """
    graph = graph_module.graph
    groups: dict[str, list[fx.Node]] = {}
    for node in marked_nodes(graph, adapter):
        call = (mark_of(node) or {}).get("call")
        if call is not None:
            groups.setdefault(call, []).append(node)
    by_name = {node.name: node for node in graph.nodes}
    for call, nodes in groups.items():
        _bypass(by_name[call], nodes)
        for node in reversed(nodes):
            graph.erase_node(node)
    return bool(groups)


def _bypass(call: fx.Node, nodes: list[fx.Node]) -> None:
    """Let the users of an adapter's result use what the adapter added to."""
    members = set(nodes)
    inputs = {source for node in nodes for source in node.all_input_nodes} - members
    base = next(source for source in inputs if source is call or _serves(source, call))
    for node in nodes:
        if any(user not in members for user in node.users):
            node.replace_all_uses_with(base, delete_user_cb=lambda user: user not in members)


def _serves(node: fx.Node, call: fx.Node) -> bool:
    """Whether a node is the result of another adapter at the same call."""
    found = mark_of(node)
    return found is not None and found.get("call") == call.name
