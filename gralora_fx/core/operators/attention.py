"""Attention, with a cache and without, and its masks: one node per layer, and passes that make padding an argument.

Padding, window and soft cap are arguments, so that an export can use the runtime's own fused operators without matching
patterns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.surgery import erase_unused
from gralora_fx.core.operators import COMPUTING
from gralora_fx.core.operators.call import Call, V, operator


@dataclass(frozen=True)
class DotProducts(Call[V]):
    """The common arguments of attention with a cache and without, in front of all others."""

    query: V  # `[batch, heads, length, size]`
    key: V  # `[batch, key heads, total, size]`; key heads divide heads
    value: V  # `[batch, key heads, total, value size]`
    mask: V | None  # hides keys; see the operators

    def attended(
        self: DotProducts[Tensor], mask: Tensor | None, scale: float, *, dropout: float = 0.0, is_causal: bool = False
    ) -> Tensor:
        """Return `softmax(scale * query @ key.T + mask) @ value`, as `[batch, heads, length, value size]`."""
        # bool: a comparison of symbolic sizes is not one
        shares_keys = bool(self.query.shape[1] != self.key.shape[1])
        return nn.functional.scaled_dot_product_attention(
            self.query, self.key, self.value, mask, dropout, is_causal, scale=scale, enable_gqa=shares_keys
        )


@operator("attention", dropout="dropout", contracts=True)
class Attention(DotProducts[V]):
    """`gralora::attention`: causal attention over a cache, as transformers' models compute it.

    The result is `[batch, length, heads, value size]`.

    Attributes:
        query: `[batch, heads, length, size]`, the last `length` positions of the sequence.
        key: `[batch, key heads, past + length, size]`; key heads divide heads.
        value: `[batch, key heads, past + length, value size]`.
        mask: `[batch, past + length]`, 0 where a position is padding, or None. Or a mask `[batch, 1 or heads, length,
            past + length]`, additive or boolean, which then replaces causality and window.
        sinks: `[heads]`, logits of an attention sink, a position without a value, or None.
        scale: Factor of the scores.
        window: Number of positions that a position attends to, itself included; 0 for all.
        softcap: Bound `c` of the scores, `c * tanh(score / c)`; 0 for none.
        dropout: Probability with which attention weights are zeroed.
    """

    sinks: V | None
    scale: float
    window: int
    softcap: float
    dropout: float

    def result(self: Attention[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        query, key, mask, length = self.query, self.key, self.mask, self.query.shape[2]
        if mask is None or mask.ndim != 4:
            padding = key.new_ones(1, key.shape[2]) if mask is None else mask
            mask = Mask(padding, length, self.window, query.dtype).result()
        elif mask.dtype == torch.bool:
            mask = _additive(mask, query.dtype)
        if not self.softcap and self.sinks is None:
            return self.attended(mask, self.scale, dropout=self.dropout).transpose(1, 2).contiguous()
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, self.value))
        scores = query @ key.transpose(-1, -2) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores + mask
        if self.sinks is None:
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        else:
            beside = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, length, 1)
            weights = torch.softmax(torch.cat([scores, beside.to(scores.dtype)], dim=-1), dim=-1)[..., :-1]
        weights = nn.functional.dropout(weights, self.dropout, training=True) if self.dropout else weights
        return (weights @ value).transpose(1, 2).contiguous()

    def shape_only(self: Attention[Tensor]) -> Tensor:
        """Return an empty tensor of the shape; record equal sizes, so that all layers' caches share symbols."""
        query, key, value, mask = self.query, self.key, self.value, self.mask
        equal = [key.shape[2] == value.shape[2]]
        if mask is not None:
            equal += [mask.shape[0] == query.shape[0], mask.shape[-1] == key.shape[2]]
        for condition in equal:
            torch._check(condition)  # type: ignore[no-untyped-call]
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@operator("dot_product_attention")
class DotProductAttention(DotProducts[V]):
    """`gralora::dot_product_attention`: attention without a cache, as PyTorch's `scaled_dot_product_attention`.

    The result is `[batch, heads, length, value size]`.

    Attributes:
        query: `[batch, heads, length, size]`.
        key: `[batch, key heads, total, size]`; key heads divide heads.
        value: `[batch, key heads, total, value size]`.
        mask: Boolean, false where a key is hidden, or additive; it broadcasts to `[batch, heads, length, total]`. None
            if only padding is masked.
        padding: `[batch, total]`, zero where a key is padding, to be hidden in addition to `mask`; or None.
        scale: Factor of the scores.
        is_causal: Whether each position attends only to itself and earlier ones; `mask` and `padding` are then None.
    """

    padding: V | None
    scale: float
    is_causal: bool

    def result(self: DotProductAttention[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        mask = self.mask
        if self.padding is not None:
            keys = self.padding.bool().unsqueeze(1).unsqueeze(1)
            if mask is None:
                mask = keys.expand(-1, 1, self.query.shape[2], -1)
            elif mask.dtype == torch.bool:
                mask = mask & keys
            else:
                mask = mask.masked_fill(~keys, torch.finfo(mask.dtype).min)
        return self.attended(mask, self.scale, is_causal=self.is_causal)


@operator("mask")
class Mask(Call[V]):
    """`gralora::mask`: the additive causal mask. A position attends to itself and earlier ones, and never to padding.

    The result is `[batch, 1, length, past + length]`, 0 or the smallest number.
    """

    padding: V  # `[batch, past + length]`, 0 where a position is padding
    length: V | int  # number of new positions
    window: int  # number of positions that a position attends to, itself included; 0 for all
    dtype: torch.dtype  # dtype of the scores

    def result(self: Mask[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        total, device, length = self.padding.shape[1], self.padding.device, cast(int, self.length)
        seen = _seen(length, total, self.window, device)
        seen = seen.unsqueeze(0).unsqueeze(0) & self.padding.bool().unsqueeze(1).unsqueeze(1)
        return _additive(seen, self.dtype)

    def shape_only(self: Mask[Tensor]) -> Tensor:
        """Return an empty tensor of the shape."""
        batch, total = self.padding.shape
        return self.padding.new_empty((batch, 1, cast(int, self.length), total), dtype=self.dtype)


@operator("documents")
class Documents(Call[V]):
    """`gralora::documents`: the causal mask of rows that hold several texts; a token attends only to its own text.

    The result is boolean, `[batch, 1, length, total]`.
    """

    numbers: V  # `[batch, total]`, the number of each position's text
    length: V | int  # number of new positions
    window: int  # number of positions that a position attends to, itself included; 0 for all

    def result(self: Documents[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        numbers, length = self.numbers.unsqueeze(1), cast(int, self.length)
        seen = _seen(length, numbers.shape[-1], self.window, numbers.device)
        own = numbers[..., numbers.shape[-1] - length :].unsqueeze(-1) == numbers.unsqueeze(2)
        return seen.unsqueeze(0).unsqueeze(0) & own


def _seen(length: int, total: int, window: int, device: torch.device) -> Tensor:
    """Return which positions each of the last ones attends to, by causality and window: `[length, total]`."""
    rows = torch.arange(length, device=device).unsqueeze(1) + (total - length)
    columns = torch.arange(total, device=device).unsqueeze(0)
    seen = columns <= rows
    return seen & (columns > rows - window) if window else seen


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as an additive one: 0 or the smallest number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


@operator("mask_of_blocks")
class MaskOfBlocks(Call[V]):
    """`gralora::mask_of_blocks`: the mask of a text with blocks, whose positions all see each other.

    A trace has both masks until it is known whether there are blocks (see `without_empty_blocks`).
    """

    blocks: V  # `[batch, past + length]`, the index of each position's block, -1 for none
    plain: V  # the mask of a text without blocks, `[batch, 1, length, past + length]`
    whole: V  # the mask with blocks, shaped like `plain`: the result

    def result(self: MaskOfBlocks[Tensor]) -> Tensor:
        """Compute the reference."""
        return self.whole.clone()


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
    """Replace attention's causal mask, but no other reader's, by the padding mask and the window it was made from.

    Before: `m = gralora.mask(to(padding, bool), length, 4); y = attention(query, key, value, m, window=0)`
    After:  `y = attention(query, key, value, padding, window=4)`
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
