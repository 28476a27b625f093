"""Marks on the nodes that a pass made, in `node.meta["custom"]["gralora"]`, which copies and re-exports keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

_KEY = "gralora"


def mark(node: fx.Node, **fields: Any) -> None:
    """Note which site and adapter a node serves."""
    node.meta.setdefault("custom", {})[_KEY] = fields


def mark_of(node: fx.Node) -> dict[str, Any] | None:
    """The mark of a node, or None where no pass made it."""
    found: dict[str, Any] | None = node.meta.get("custom", {}).get(_KEY)
    return found


def unmark(node: fx.Node) -> None:
    """Take a node's mark away."""
    notes = node.meta.get("custom", {})
    notes.pop(_KEY, None)
    if not notes:
        node.meta.pop("custom", None)


def marked_nodes(graph: fx.Graph, adapter: str) -> Iterator[fx.Node]:
    """The nodes that serve an adapter, in graph order."""
    for node in graph.nodes:
        found = mark_of(node)
        if found is not None and found["adapter"] == adapter:
            yield node
