"""`gralora::attention`: causal attention over a cache, one node a layer.

The padding mask, the window and the soft cap are its arguments, so that an export can take the runtime's own fused
operator without matching patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from gralora_fx.operators.call import Call
from gralora_fx.operators.mask import causal_mask
from gralora_fx.operators.namespace import define


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Causal attention over a cache, as transformers' models compute it.

    Args:
        query: `[batch, heads, length, size]`, the last `length` positions of the sequence.
        key: `[batch, key heads, past + length, size]`; key heads divide heads.
        value: `[batch, key heads, past + length, value size]`.
        mask: `[batch, past + length]`, 0 where a position is padding, or None. Or an additive mask, `[batch, 1 or
            heads, length, past + length]`, which then replaces causality and window.
        sinks: `[heads]`, logits of an attention sink, a position without a value, or None.
        scale: Factor of the scores.
        window: Number of positions that a position attends to, itself included; 0 for all.
        softcap: Bound `c` of the scores, `c * tanh(score / c)`; 0 for none.
        dropout: Probability with which attention weights are zeroed.

    Returns:
        `[batch, length, heads, value size]`.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if mask is not None and mask.ndim == 4:
        bias = mask
    else:
        padding = key.new_ones(1, key.shape[2]) if mask is None else mask
        bias = causal_mask(padding, length, window, query.dtype)
    if not softcap and sinks is None:
        # bool: a comparison of symbolic sizes is not one
        result = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=bool(groups > 1)
        )
        return result.transpose(1, 2).contiguous()
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    else:
        beside = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, length, 1)
        weights = torch.softmax(torch.cat([scores, beside.to(scores.dtype)], dim=-1), dim=-1)[..., :-1]
    result = nn.functional.dropout(weights, dropout, training=True) if dropout else weights
    return (result @ value).transpose(1, 2).contiguous()


def attention_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *_: Any) -> Tensor:
    """The shape-only counterpart of `attention`.

    The tracer is told which sizes are equal, so that all layers' caches share their symbols.
    """
    equal = [key.shape[2] == value.shape[2]]
    if mask is not None:
        equal += [mask.shape[0] == query.shape[0], mask.shape[-1] == key.shape[2]]
    for condition in equal:
        torch._check(condition)  # type: ignore[no-untyped-call]
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@dataclass(frozen=True)
class Attention(Call):
    """A call of `gralora::attention`; `attention` describes the arguments."""

    target: ClassVar[Any] = define(
        "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float scale, int window, "
        "float softcap, float dropout) -> Tensor",
        attention,
        shape=attention_shape,
    )

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    sinks: fx.Node | None
    scale: float
    window: int
    softcap: float
    dropout: float
