"""PyTorch's own attention whose heads share keys and values by broadcasting, which has no ONNX form of its own."""

from __future__ import annotations

import torch
from torch import fx

from gralora_fx.exporters.fx_passes.matching import aten, number, shape
from gralora_fx.exporters.pipeline import PassResult
from gralora_fx.operators.attention import Attention

_SDPA = aten.scaled_dot_product_attention.default


def mark_shared_heads(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Put attention of many heads over fewer keys in terms of one operator.

    Before: `y = scaled_dot_product_attention(query, key, value, mask)`, key and value of one head
    After:  `y = transpose(attention(query, key, value, not mask * smallest))`

    Args:
        graph: A traced graph in evaluation mode; it is changed in place.

    Returns:
        How many there were.
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
            apart = graph.call_function(aten.transpose.int, (together, 1, 2))
        together.meta = {**node.meta, "val": node.meta["val"].transpose(1, 2)}
        apart.meta = dict(node.meta)
        node.replace_all_uses_with(apart)
        graph.erase_node(node)
        count += 1
    return PassResult(count)


def _added(graph: fx.Graph, mask: fx.Node, query: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """What is added to the scores, of a mask that says what is seen or is that already."""
    value, dtype = mask.meta["val"], query.meta["val"].dtype
    if value.dtype != torch.bool:
        return mask
    if mask in made:
        return made[mask]
    with graph.inserting_before(mask.next):
        hidden = graph.call_function(aten.logical_not.default, (mask,))
        as_number = graph.call_function(aten._to_copy.default, (hidden,), {"dtype": dtype})
        added = graph.call_function(aten.mul.Tensor, (as_number, torch.finfo(dtype).min))
    hidden.meta = dict(mask.meta)
    for part in (as_number, added):
        part.meta = {**mask.meta, "val": value.to(dtype)}
    made[mask] = added
    return added
