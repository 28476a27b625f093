"""Attention as one operator of a trace, whatever the model's architecture: `gralora::attention`.

A traced model that keeps a cache shows its attention as one node a layer, with the padding mask, the window and the
soft cap as arguments, so that an export can take the runtime's own fused operator without matching patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, PreTrainedModel

from gralora_fx.operators.namespace import NAMESPACE, define_shape_only, operators_for
from gralora_fx.tracing.patches.masks import CASTS, causal_mask

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float scale, int window, "
    "float softcap, float dropout) -> Tensor"
)
_library.define(_SCHEMA)


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
        mask: `[batch, past + length]`, 0 where a position is padding, or None. Or what a model of its own making adds
            to the scores, `[batch, 1 or heads, length, past + length]`: it alone then tells what is seen.
        sinks: `[heads]`, logits of a position that is attended to and has no value, or None.
        scale: Factor of the scores.
        window: How many positions back a position sees, itself included; 0 for all.
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


def attention_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *_: Any) -> Tensor:
    """A tensor of the shape of `attention`'s result, without values.

    The tracer is told what is equal, so that the sizes of all layers' caches are one.
    """
    equal = [key.shape[2] == value.shape[2]]
    if mask is not None:
        equal += [mask.shape[0] == query.shape[0], mask.shape[-1] == key.shape[2]]
    for condition in equal:
        torch._check(condition)  # type: ignore[no-untyped-call]
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


_library.impl("attention", attention, "CompositeImplicitAutograd")
define_shape_only(_SCHEMA, attention_shape, torch.ops.gralora.attention.default)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The operator, as a model of transformers calls its attention."""
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    numbers = (float(scale), int(options.get("sliding_window") or 0), float(options.get("softcap") or 0.0))
    sinks, dropout = options.get("s_aux"), float(options.get("dropout") or 0.0)
    result: Tensor = operators_for(query).attention(query, key, value, attention_mask, sinks, *numbers, dropout)
    return result, None


AttentionInterface.register(NAMESPACE, _forward)


@contextmanager
def fused_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model call `gralora::attention` while the block lasts; a model that is traced gets its shape alone."""
    parts = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel) and _calls_interface(m)}
    before = {key: config._attn_implementation for key, config in parts.items()}
    try:
        for config in parts.values():
            config._attn_implementation = NAMESPACE
        yield
    finally:
        for key, config in parts.items():
            config._attn_implementation = before[key]


def padding_as_argument(graph: fx.Graph) -> None:
    """Let attention take the padding mask and the window of the mask that its model made of them.

    Before: `m = gralora.mask(to(padding, bool), length, 4); y = attention(query, key, value, m, window=0)`
    After:  `y = attention(query, key, value, padding, window=4)`

    A mask that something else reads too, such as an addition to it, stays for that.

    Args:
        graph: A fresh trace; it is changed in place.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.gralora.attention.default):
        mask = node.args[3]
        if isinstance(mask, fx.Node) and mask.target is torch.ops.gralora.mask.default:
            padding, _, window, *_ = mask.args
            while isinstance(padding, fx.Node) and padding.target in CASTS:
                (padding, *_) = padding.args
            node.update_arg(3, padding)
            node.update_arg(6, window)
            while not mask.users and mask.op == "call_function":
                unused, mask = mask, mask.args[0]
                graph.erase_node(unused)


def _calls_interface(model: PreTrainedModel) -> bool:
    """Whether a model's attention is called through transformers' interface; others compute it by themselves."""
    return bool(model._can_set_attn_implementation())
