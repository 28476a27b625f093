"""Functions that models with a recurrent state copy from each other, as operators: one form for a prompt and a step.

transformers has a function for prompts, which computes chunks, and one for single tokens. An operator takes any length,
so a model's own forward does what it should with the former alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from gralora_fx.core.operators.layers import RmsNorm
from gralora_fx.features.states.cached_states import conv_read
from gralora_fx.features.states.linear_attention import LinearAttention
from gralora_fx.features.states.operators import CausalConv
from gralora_fx.features.states.recognised import SILU
from gralora_fx.features.states.state_space_layers import shown

_L2_EPS = 1e-6  # what transformers adds to a sum of squares


def convolve(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """A causal convolution of each channel, `[batch, channels, length]`, with its activation.

    Of a read of a cache, which is inputs that were kept and new ones, it gives what there is for the new ones.
    """
    read = conv_read(hidden_states)
    if read is not None and read.kept.shape[-1] != weight.shape[-1] - 1:
        read = None
    y, state = CausalConv.compute_with_state(
        x=hidden_states if read is None else read.new,
        weight=weight.unsqueeze(1),
        bias=bias,
        state=None if read is None else read.kept,
        silu=activation in SILU,
    )
    if read is not None:
        read.keep(state)
    return y if activation is None or activation in SILU else ACT2FN[activation](y)


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, https://arxiv.org/abs/2412.06464; with a decay for each key it is Kimi's delta attention.

    Arguments and results are those of the function that it replaces.
    """
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    y, state = LinearAttention.compute_with_state(
        query=query, key=key, value=value, decay=g, beta=beta, state=initial_state, scale=query.shape[-1] ** -0.5
    )
    return y, state if output_final_state else None


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1: an RMS norm of weight `size ** -0.5`, whose epsilon is of the mean of squares."""
    size = int(x.shape[-1])
    weight = torch.full((size,), size**-0.5, dtype=x.dtype, device=x.device)
    return RmsNorm.compute(x=x, weight=weight, eps=_L2_EPS / size)


def lightning(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    cache: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """MiniMax's lightning attention, https://arxiv.org/abs/2401.04658: each head's state decays by a constant.

    transformers lets it decay at padding too; here padding leaves it as it is.
    """
    states = shown(module.act_fn(module.qkv_proj(hidden_states)), attention_mask)
    heads = torch.unflatten(states, -1, (module.num_attention_heads, 3 * module.head_dim))
    query, key, value = torch.split(heads, module.head_dim, dim=-1)
    decay = -module.slope_rate.flatten().expand(*heads.shape[:3])
    y, state = LinearAttention.compute_with_state(
        query=query,
        key=key,
        value=value,
        decay=shown(decay, attention_mask),
        beta=None,
        state=None if cache is None else cache.get_linear_cache(module.layer_idx),
        scale=1.0,
    )
    if cache is not None:
        cache.set_linear_cache(module.layer_idx, state)
    gate = nn.functional.sigmoid(module.output_gate(hidden_states))
    return module.out_proj(gate * module.norm(y.flatten(2))), state
