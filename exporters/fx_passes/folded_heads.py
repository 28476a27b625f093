"""Heads folded into the batch, `[batch * heads, length, size]`, as products of three axes take them."""

from __future__ import annotations

from typing import Any

from torch import fx

from gralora_fx.exporters.fx_passes.matching import aten, expression, is_call, reshaped, same_size, shape


def refolded(node: Any) -> fx.Node | None:
    """What a node gives again with heads folded into the batch or taken out of it; None of anything else.

    Before: `x` of `[batch, heads, length, size]`
    After:  `reshape(x)` of `[batch * heads, length, size]`, or the reverse
    """
    source = node.args[0] if is_call(node, aten.expand.default) else reshaped(node)
    if not isinstance(source, fx.Node):
        return None
    before, after = shape(source), shape(node)
    is_same = {len(before), len(after)} <= {3, 4} and all(map(same_size, before[-2:], after[-2:]))
    if is_call(node, aten.expand.default):
        is_same = is_same and len(before) == len(after) and all(map(same_size, before, after))
    return source if is_same else None


def heads_of(node: Any) -> int | None:
    """The number of heads of a tensor of four axes; None if it has other axes, or the number is not known."""
    sizes = shape(node)
    heads = expression(sizes[1]) if len(sizes) == 4 else None
    return heads if isinstance(heads, int) else None


def with_heads(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """A tensor `[batch, heads, length, size]`, taken from before its heads were folded where that is possible.

    Args:
        graph: The graph, at the place where a new node may stand.
        node: The tensor, with four axes or with folded heads.
        heads: The number of heads.
    """
    source: fx.Node | None = node
    while source is not None and heads_of(source) != heads:
        source = refolded(source)
    if source is not None:
        return source
    apart = graph.call_function(aten.unflatten.int, (node, 0, [-1, heads]))
    value = node.meta["val"]
    apart.meta = {**node.meta, "val": value.unflatten(0, [value.shape[0] // heads, heads])}
    return apart


def replace_folded(graph: fx.Graph, new: fx.Node, old: fx.Node) -> None:
    """Let the readers of a product of three axes read its counterpart of four.

    Args:
        graph: The graph, at the place of the old node.
        new: `[batch, heads, length, size]`.
        old: The same with folded heads.
    """
    for user in list(old.users):
        if refolded(user) is old and all(map(same_size, shape(user), shape(new))) and len(shape(user)) == 4:
            user.replace_all_uses_with(new)
    if old.users:
        folded = graph.call_function(aten.flatten.using_ints, (new, 0, 1))
        folded.meta = dict(old.meta)
        old.replace_all_uses_with(folded, delete_user_cb=lambda user: user is not folded)
