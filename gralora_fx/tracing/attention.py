"""Attention as one operator of a trace, whatever the model's architecture: `gralora::attention`.

A traced model that keeps a cache shows its attention as one node a layer, with the padding mask, the window and the
soft cap as arguments, so that an export can take the runtime's own fused operator without matching patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

NAME = "gralora"

# Models that are being traced: only the result's shape matters then, and working out the rest takes most of the time.
_TRACED: set[int] = set()

_library: Any = torch.library.Library(NAME, "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float scale, int window, "
    "float softcap, float dropout) -> Tensor"
)


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
        mask: `[batch, past + length]`, 0 where a position is padding, or None.
        sinks: `[heads]`, logits of a position that is attended to and has no value, or None.
        scale: Factor of the scores.
        window: How many positions back a position sees, itself included; 0 for all.
        softcap: Bound `c` of the scores, `c * tanh(score / c)`; 0 for none.
        dropout: Probability with which attention weights are zeroed.

    Returns:
        `[batch, length, heads, value size]`.
    """
    if _TRACED:
        _note_sizes(query, key, value, mask)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    length, total, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    rows = torch.arange(length, device=query.device).unsqueeze(1) + (total - length)
    columns = torch.arange(total, device=query.device).unsqueeze(0)
    seen = columns <= rows
    if window:
        seen = seen & (columns > rows - window)
    seen = seen.unsqueeze(0).unsqueeze(0)  # [1, 1, length, total]
    if mask is not None:
        seen = seen & mask.bool().unsqueeze(1).unsqueeze(1)
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~seen, torch.finfo(query.dtype).min
    )
    if not softcap and sinks is None:
        result = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
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


def _note_sizes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Tell the tracer what is equal, so that the sizes of all layers' caches are one."""
    equal = [key.shape[2] == value.shape[2]]
    if mask is not None:
        equal += [mask.shape[0] == query.shape[0], mask.shape[1] == key.shape[2]]
    for condition in equal:
        torch._check(condition)  # type: ignore[no-untyped-call]


_library.impl("attention", attention, "CompositeImplicitAutograd")


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The operator, as a model of transformers calls its attention."""
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    numbers = (float(scale), int(options.get("sliding_window") or 0), float(options.get("softcap") or 0.0))
    sinks, dropout = options.get("s_aux"), float(options.get("dropout") or 0.0)
    result: Tensor = torch.ops.gralora.attention(query, key, value, attention_mask, sinks, *numbers, dropout)
    return result, None


def _mask(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The padding mask itself; what else hides a position is an argument of the operator."""
    return attention_mask


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def fused_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model call `gralora::attention` while the block lasts, for its shape only: the values are not computed."""
    parts = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in parts.items()}
    try:
        for config in parts.values():
            config._attn_implementation = NAME
        _TRACED.add(id(model))
        yield
    finally:
        _TRACED.discard(id(model))
        for key, config in parts.items():
            config._attn_implementation = before[key]
