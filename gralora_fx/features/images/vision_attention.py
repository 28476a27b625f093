"""Attention of a vision tower within segments of one sequence, such as windows of an image, as one product each layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "flash_segments"  # code of transformers passes segments to what has flash in its name


@contextmanager
def attention_in_segments(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model whose attention takes `cu_seqlens` call one attention each, within the block."""
    AttentionInterface.register(NAME, _attend)  # which no model asks for but those within the block
    layers = [part for part in model.modules() if _takes_segments(part)]
    before = [(layer.config, layer.config._attn_implementation) for layer in layers]
    with ExitStack() as changed:
        for layer in layers:  # as it is: transformers' exporter replaces the methods of classes
            changed.enter_context(patch.object(layer, "forward", functools.partial(type(layer).forward, layer)))
            layer.config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, own in reversed(before):
                config._attn_implementation = own


def _takes_segments(part: nn.Module) -> bool:
    """Return whether a module is a layer of attention that is told where segments begin."""
    code = getattr(type(part).forward, "__code__", None)
    return code is not None and {"cu_seqlens", "attention_interface"} <= {*code.co_varnames, *code.co_cellvars}


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within segments; `cu_seq_lens_q [segments + 1]` says where each begins.

    Args:
        module: The layer.
        query: `[1, heads, positions, size]`; `key` and `value` alike, of a divisor of the heads.
        key: The keys.
        value: The values.
        attention_mask: Added to the scores, or None.
        **options: What transformers passes to flash attention.
    """
    ends, most = options["cu_seq_lens_q"], options["max_length_q"]
    attend = functools.partial(
        scaled_dot_product_attention,
        scale=options["scaling"],
        dropout_p=options.get("dropout") or 0.0,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if isinstance(ends.shape[0], int) and ends.shape[0] == 2:
        return attend(query, key, value, attn_mask=attention_mask).transpose(1, 2), None
    index = ends[:-1, None] + torch.arange(most, device=ends.device)
    is_in = index < ends[1:, None]
    index = torch.where(is_in, index, 0)
    split = (tensor.squeeze(0)[:, index].transpose(0, 1) for tensor in (query, key, value))
    result = attend(*split, attn_mask=is_in[:, None, None])
    own = torch.arange(query.shape[2], device=ends.device)
    segment = (own[:, None] >= ends[None, 1:]).sum(1)
    padded = result.transpose(1, 2).flatten(0, 1)
    return padded[segment * most + own - ends[segment]][None], None
