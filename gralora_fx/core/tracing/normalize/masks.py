"""Masks of a decoder's attention: the padding and the window that each was computed from, in place of the mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.surgery import erase_unused
from gralora_fx.core.operators import COMPUTING
from gralora_fx.core.operators.attention import Attention, Mask, MaskOfBlocks

_ONE_MASK = "a mask has one form"
_CASTS = (
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.device,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten._to_copy.default,
)


@contract(needs={COMPUTING}, leaves={_ONE_MASK})
def without_empty_blocks(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Keep one of the two masks: the plain one if no position is in a block.

    Before: `blocks = full(size, -1); m = mask_of_blocks(blocks, mask(padding, ...), whole)`
    After:  `m = mask(padding, ...)`
    """
    masks = list(MaskOfBlocks.all_in(graph))
    for node, mask in masks:
        node.replace_all_uses_with(mask.plain if _holds_only(mask.blocks, -1) else mask.whole)
        erase_unused(graph, node)
    return PassResult(len(masks))


def _holds_only(node: Any, number: int) -> bool:
    """Return whether a tensor is filled with one number, judging by the operators that create it."""
    while isinstance(node, fx.Node) and node.target in _CASTS:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    if node.target is torch.ops.aten.pad.default:
        return node.args[2:] == ("constant", number) and _holds_only(node.args[0], number)
    return node.target is torch.ops.aten.full.default and node.args[1:] == (number,)


@contract(needs={COMPUTING, _ONE_MASK})
def padding_as_argument(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace attention's causal mask by the padding mask and the window that it was computed from.

    Before: `m = gralora.mask(to(padding, bool), length, 4); y = attention(query, key, value, m, window=0)`
    After:  `y = attention(query, key, value, padding, window=4)`

    A mask with other readers, such as an addition to it, stays for those.
    """
    changed = 0
    for node, attention in Attention.all_in(graph):
        mask = Mask.of(attention.mask)
        if mask is not None and attention.mask is not None:
            padding: Any = mask.padding
            while padding.target in _CASTS:
                padding = padding.args[0]
            replace(attention, mask=padding, window=mask.window).write(node)
            erase_unused(graph, attention.mask)
            changed += 1
    return PassResult(changed)
