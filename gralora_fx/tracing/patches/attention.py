"""Attention as one operator of a trace, whatever the model's architecture: `gralora::attention`, one node a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gralora_fx.compat.transformers_models import AttentionMaskInterface
from gralora_fx.operators.attention import Attention
from gralora_fx.operators.call import NAMESPACE
from gralora_fx.tracing.patches.masks import make_mask


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The operator behind transformers' attention interface."""
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result = Attention.compute(
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        sinks=options.get("s_aux"),
        scale=float(scale),
        window=int(options.get("sliding_window") or 0),
        softcap=float(options.get("softcap") or 0.0),
        dropout=float(options.get("dropout") or 0.0),
    )
    return result, None


AttentionInterface.register(NAMESPACE, _forward)
AttentionMaskInterface.register(NAMESPACE, make_mask)


@contextmanager
def fused_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model call `gralora::attention` within the block, or its shape-only counterpart while it is traced."""
    parts = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel) and _calls_interface(m)}
    before = {key: config._attn_implementation for key, config in parts.items()}
    try:
        for config in parts.values():
            config._attn_implementation = NAMESPACE
        yield
    finally:
        for key, config in parts.items():
            config._attn_implementation = before[key]


def _calls_interface(model: PreTrainedModel) -> bool:
    """Whether a model calls its attention through transformers' interface."""
    return bool(model._can_set_attn_implementation())
