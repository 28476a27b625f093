"""Multi-query attention: PyTorch's own attention with keys and values broadcast over heads."""

from __future__ import annotations

import torch
from torch import fx

from gralora_fx.exporters.fx_passes.matching import aten, number, shape
from gralora_fx.graph.pipeline import PassResult
from gralora_fx.operators.attention import Attention

_SDPA = aten.scaled_dot_product_attention.default


def match_broadcast_attention(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Rewrite broadcast (multi-query) attention as one attention operator.

    Before: `y = scaled_dot_product_attention(query, key, value, mask)`, key and value of one head
    After:  `y = transpose(attention(query, key, value, not mask * smallest))`

    Args:
        graph: A traced graph in evaluation mode; it is changed in place.

    Returns:
        The number of matches.
    """
    count = 0
    masks: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=_SDPA):
        query, key, value, *options = node.args
        mask = options[0] if options else node.kwargs.get("attn_mask")
        plain = not any(options[1:]) and not node.kwargs.get("dropout_p") and not node.kwargs.get("is_causal")
        sizes = [shape(part) for part in (query, key, value, mask)]
        heads, key_heads = (size[1] if len(size) == 4 else None for size in sizes[:2])
        if not plain or not isinstance(heads, int) or not isinstance(key_heads, int) or heads == key_heads:
            continue
        if len(sizes[3]) != 4 or heads % key_heads:
            continue
        scale = number(node.kwargs.get("scale")) or float(sizes[0][3]) ** -0.5
        with graph.inserting_before(node):
            bias = _added(graph, mask, query, masks)
            attention = Attention(query, key, value, bias, None, scale=scale, window=0, softcap=0.0, dropout=0.0)
            together = attention.insert(graph)
            transposed = graph.call_function(aten.transpose.int, (together, 1, 2))
        together.meta = {**node.meta, "val": node.meta["val"].transpose(1, 2)}
        transposed.meta = dict(node.meta)
        node.replace_all_uses_with(transposed)
        graph.erase_node(node)
        count += 1
    return PassResult(count)


def _added(graph: fx.Graph, mask: fx.Node, query: fx.Node, masks: dict[fx.Node, fx.Node]) -> fx.Node:
    """The additive mask of a boolean mask; an additive mask itself."""
    value, dtype = mask.meta["val"], query.meta["val"].dtype
    if value.dtype != torch.bool:
        return mask
    if mask in masks:
        return masks[mask]
    with graph.inserting_before(mask.next):
        hidden = graph.call_function(aten.logical_not.default, (mask,))
        as_number = graph.call_function(aten._to_copy.default, (hidden,), {"dtype": dtype})
        added = graph.call_function(aten.mul.Tensor, (as_number, torch.finfo(dtype).min))
    hidden.meta = dict(mask.meta)
    for part in (as_number, added):
        part.meta = {**mask.meta, "val": value.to(dtype)}
    masks[mask] = added
    return added
