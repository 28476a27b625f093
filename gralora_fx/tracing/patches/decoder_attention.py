"""Attention of a decoder with a cache as one operator of a trace, `gralora::attention`, and its mask as another.

A model that calls its attention through transformers' interface needs nothing here. One that computes it by itself has
a line in `ATTENTIONS`: what is recognised, and what replaces it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gralora_fx.compat.transformers_models import (
    AttentionMaskInterface,
    blockwise_overlay,
    causal_mask_function,
    eager_mask,
    or_masks,
    sliding_window_causal_mask_function,
)
from gralora_fx.operators.attention import Attention, Mask, MaskOfBlocks
from gralora_fx.operators.call import NAMESPACE
from gralora_fx.tracing.patches.recognised import ROTARY_EMBEDDING, Recognised, replaced


@contextmanager
def attention_as_operators(model: PreTrainedModel) -> Iterator[None]:
    """Let a model call `gralora::attention` within the block, or its shape-only counterpart while it is traced.

    What makes its masks is told so, and calls `gralora::mask`, until it is known what reads them.
    """
    parts = {id(part.config): part.config for part in model.modules() if _has_operator(part)}
    before = {key: config._attn_implementation for key, config in parts.items()}
    try:
        for config in parts.values():
            config._attn_implementation = NAMESPACE
        with replaced(model, ATTENTIONS):
            yield
    finally:
        for key, config in parts.items():
            config._attn_implementation = before[key]


def _has_operator(part: nn.Module) -> bool:
    """Whether a model calls its attention through transformers' interface, or is one of `ATTENTIONS`."""
    if not isinstance(part, PreTrainedModel):
        return False
    is_own = any(code.replaces_in(module) for module in part.modules() for code in ATTENTIONS)
    return is_own or bool(part._can_set_attn_implementation())


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The operator behind transformers' attention interface."""
    scale = options.get("scaling")
    result = Attention.compute(
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        sinks=options.get("s_aux"),
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=int(options.get("sliding_window") or 0),
        softcap=float(options.get("softcap") or 0.0),
        dropout=float(options.get("dropout") or 0.0),
    )
    return result, None


def _falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: None,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Falcon's attention with rotary embeddings; it has no dropout."""
    parts = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in parts)
    query, key = ROTARY_EMBEDDING.replacement(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    attended, _none = _attend(module, query, key, value, attention_mask)
    return module.dense(attended.flatten(2)), None


# attention that models compute by themselves, not through transformers' interface
ATTENTIONS = (
    Recognised(
        "falcon.modeling_falcon:FalconAttention.forward",
        _falcon,
        ending="FalconAttention",
        fits=lambda module: not module.config.alibi,  # a bias for each head is more than a mask
    ),
)


def make_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """The mask behind transformers' mask interface, as one operator if it is causal with at most a window."""
    window = local_size or 0
    plain = sliding_window_causal_mask_function(window) if window else causal_mask_function
    if attention_mask is not None and _is_same(mask_function, plain):
        torch._check(attention_mask.shape[1] == kv_length)  # type: ignore[no-untyped-call]
        return Mask.compute(padding=attention_mask, length=q_length, window=window, dtype=dtype)
    whole: Tensor | None = eager_mask(
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        dtype=dtype,
        **options,
    )
    blocks = _blocks_beside(mask_function, plain)
    if attention_mask is None or blocks is None:
        return whole
    without = Mask.compute(padding=attention_mask, length=q_length, window=window, dtype=dtype)
    return MaskOfBlocks.compute(blocks=blocks, plain=without, whole=whole)


def _blocks_beside(mask_function: Any, plain: Callable[..., Any]) -> Tensor | None:
    """The blocks of a mask that is a plain one or'ed with attention within blocks; None for any other."""
    blocks: list[Any] = []
    for part in _closure_values(mask_function)[0] if _closure_values(mask_function) else ():
        blocks += [value for value in _closure_values(part) if isinstance(value, Tensor)]
    is_one = len(blocks) == 1 and _is_same(mask_function, or_masks(plain, blockwise_overlay(blocks[0])))
    return blocks[0] if is_one else None


def _closure_values(function: Any) -> tuple[Any, ...]:
    """The values in a function's closure."""
    return tuple(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code and closure values, compared recursively."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if not (inspect.isfunction(one) and inspect.isfunction(other)):
        return type(one) is type(other) and bool(one == other)
    return one.__code__ is other.__code__ and _is_same(_closure_values(one), _closure_values(other))


AttentionInterface.register(NAMESPACE, _attend)
AttentionMaskInterface.register(NAMESPACE, make_mask)
