"""`gralora::dot_product_attention`: attention without a cache, its padding apart from the rest of its mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from gralora_fx.operators.call import Call
from gralora_fx.operators.namespace import define


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """`softmax(scale * query @ key.T + mask) @ value`, as PyTorch's `scaled_dot_product_attention`.

    Args:
        query: `[batch, heads, length, size]`.
        key: `[batch, key heads, total, size]`; key heads divide heads.
        value: `[batch, key heads, total, value size]`.
        mask: Boolean, false where a key is hidden, or additive; it broadcasts to `[batch, heads, length, total]`. None
            where nothing but padding is masked.
        padding: `[batch, total]`, zero where a key is padding, which hides it beside what the mask hides, or None.
        scale: Factor of the scores.
        is_causal: Whether each position attends only to itself and earlier ones; `mask` and `padding` are then None.

    Returns:
        `[batch, heads, length, value size]`.
    """
    if padding is not None:
        keys = padding.bool().unsqueeze(1).unsqueeze(1)
        if mask is None:
            mask = keys.expand(-1, 1, query.shape[2], -1)
        elif mask.dtype == torch.bool:
            mask = mask & keys
        else:
            mask = mask.masked_fill(~keys, torch.finfo(mask.dtype).min)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=bool(query.shape[1] != key.shape[1])
    )


@dataclass(frozen=True)
class DotProductAttention(Call):
    """A call of `gralora::dot_product_attention`; `dot_product_attention` describes the arguments."""

    target: ClassVar[Any] = define(
        "dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? padding, float scale, "
        "bool is_causal) -> Tensor",
        dot_product_attention,
    )

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    padding: fx.Node | None
    scale: float
    is_causal: bool
