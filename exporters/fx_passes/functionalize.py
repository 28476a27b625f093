"""Functionalization of writes into parts of tensors: ONNX has no in-place operators."""

from __future__ import annotations

import operator

from torch import fx

from gralora_fx.compat.torch_graphs import OpOverload, is_mutable, schema_of
from gralora_fx.exporters.fx_passes.retrace import retrace
from gralora_fx.graph.pipeline import PassResult


def functionalize(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Functionalize writes into shared memory, such as into a slice of a tensor that is read afterwards.

    Before: `y = new_empty(...); part = slice(y, ...); copy_(part, x); z = y + 1`
    After:  `y = new_empty(...); written = slice_scatter(y, x, ...); z = written + 1`

    A write into memory that is not shared stays; `out_of_place` replaces it.

    Args:
        graph: A traced graph, every node with the value that tracing noted; it is changed in place.

    Returns:
        The number of tensors that were written into.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    families: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if (root := _root(node)) is not None:
            families.setdefault(root, [root]).append(node)
    spans = []
    for root, members in families.items():
        writes = [node for node in members if _writes(node)]
        if writes and any(not _writes(node) for node in members[1:]):
            begin = root if _is_computed(root) else members[1]
            spans.append((order[begin], order[writes[-1]], root))
    nodes = list(graph.nodes)
    for first, last, roots in _joined(spans):
        span = nodes[first : last + 1]
        calls = [node for node in span if _is_computed(node) or _shares_with(node) is not None]
        outer = [root for root in roots if root not in calls]
        retrace(calls, written=outer)
    return PassResult(len(spans))


def _joined(spans: list[tuple[int, int, fx.Node]]) -> list[tuple[int, int, list[fx.Node]]]:
    """Merge spans that overlap."""
    joined: list[tuple[int, int, list[fx.Node]]] = []
    for begin, end, root in sorted(spans, key=lambda span: span[:2]):
        if joined and begin <= joined[-1][1]:
            first, last, roots = joined.pop()
            joined.append((first, max(last, end), [*roots, root]))
        else:
            joined.append((begin, end, [root]))
    return joined


def _is_computed(node: fx.Node) -> bool:
    """Whether a node computes a tensor, rather than selecting one of several results."""
    return node.op == "call_function" and node.target is not operator.getitem


def _root(node: fx.Node) -> fx.Node | None:
    """The tensor whose memory a node's result may alias; None if it has memory of its own."""
    source = node
    while (earlier := _shares_with(source)) is not None:
        source = earlier
    return source if source is not node else None


def _shares_with(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:
        return source if _shares_with(source) is not None else None
    if not isinstance(node.target, OpOverload):
        return None
    returns = schema_of(node.target).returns
    return source if returns and returns[0].alias_info is not None else None


def _writes(node: fx.Node) -> bool:
    return is_mutable(node.target)
