"""The passes over attention without a cache, in torch.fx and ONNX; a model without attention loads this file alone."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

from gralora_fx.core.graph.module_tree import innermost_path
from gralora_fx.core.graph.pipeline import PassResult, Skip, contract
from gralora_fx.exporters.reports import AttentionReport
from gralora_fx.exporters.rules.onnx_pipeline import FUSED_ATTENTION, ONE_SPELLING, SIMPLIFIED
from gralora_fx.exporters.translation.matching import aten, is_call
from gralora_fx.exporters.translation.names import layer_of
from gralora_fx.exporters.translation.operators import DotProductAttentionNode

_SDPA = aten.scaled_dot_product_attention.default


@contract(needs={SIMPLIFIED, ONE_SPELLING})
def match_attention(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Rewrite attention without a cache as one operator, with padding apart from the rest of its mask.

    Before: `y = softmax(query @ transpose(key) * scale + bias + where(padding, 0, smallest)) @ value`
    After:  `y = dot_product_attention(query, key, value, bias, padding, scale)`

    Likewise for `scaled_dot_product_attention`, for scores that `masked_fill` hides, and for products of
    `[batch * heads, length, size]`.
    """
    count, skipped = 0, []
    for node in list(graph.nodes):
        if is_call(node, _SDPA):
            from gralora_fx.exporters.rules.attention.match_attention import replace_operator

            count += replace_operator(graph, node)
        elif is_call(node, aten.softmax.int, aten._softmax.default):
            from gralora_fx.exporters.rules.attention.match_attention import replace_softmax

            found = replace_softmax(graph, node)
            if isinstance(found, str):
                skipped.append(Skip(innermost_path(node) or node.name, found))
            else:
                count += found
    graph.eliminate_dead_code()
    return PassResult(count, tuple(skipped), summary=AttentionReport.of(0, skipped) if skipped else None)


@contract(leaves={FUSED_ATTENTION})
@dataclass(frozen=True)
class FuseDotProductAttention:
    """Replace attention without a cache by one operator, which takes queries, keys and values with heads merged.

    Before: `y = DotProductAttention(Transpose(Reshape(q)), Transpose(Reshape(k)), Transpose(Reshape(v)), padding)`
    After:  `y = MultiHeadAttention(q, k, v, padding)`

    ONNX Runtime's `MultiHeadAttention` supports neither causal attention nor fewer key heads than query heads: those
    become ONNX's `Attention`. Queries, keys and values stay three products: splitting a packed one costs more than
    packing saves.
    """

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Replace them, in place; decomposed layers are skipped, the summary is an `AttentionReport`."""
        found = list(DotProductAttentionNode.all_in(model.graph))
        if not found:
            return PassResult(0)
        from gralora_fx.exporters.rules.attention.plain_attention import Masks, replace_attention

        masks, plain = Masks(model.graph), []
        for node, attention in found:
            why = replace_attention(model.graph, node, attention, masks)
            if why is not None:
                plain.append(Skip(layer_of(node), why))
        fused = len(found) - len(plain)
        return PassResult(fused, tuple(plain), summary=AttentionReport.of(fused, plain))
