"""Keep a layer's own output whole where something besides its adapters reads it."""

from __future__ import annotations

from torch import fx

from gralora_fx.graph.annotations import mark_of
from gralora_fx.methods.low_rank import accumulate


def protect_outputs(graph: fx.Graph) -> bool:
    """Let an adapter add beside a layer's output, instead of into it, where another node reads that output.

    Before: `y = linear(x, w, b); p = probe(y); ...; z = accumulate(blocks of y, ...)`
    After:  `y = linear(x, w, b); p = probe(y); ...; z = accumulate(blocks of y, ..., in_place=False)`

    Insertion gives an adapter's result to every reader, so only a later pass can make such a node.

    Args:
        graph: The graph; it must be compiled afterwards.

    Returns:
        Whether any node changed.
    """
    has_changed = False
    for node in graph.find_nodes(op="call_function", target=accumulate):
        own = mark_of(node)
        source = node.args[0]
        while isinstance(source, fx.Node) and node.kwargs.get("in_place", True):
            if any(mark_of(user) != own for user in source.users):
                node.update_kwarg("in_place", False)
                has_changed = True
            if mark_of(source) is None or not source.args:
                break
            source = source.args[0]
    return has_changed
