"""Annotations of nodes that a pass created, in `node.meta["custom"]["gralora"]`, which copies and re-exports keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

_KEY = "gralora"


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
