"""Replacements for transformers' layers with a state, and functions of them, that trace to operators.

transformers computes a prompt in chunks or step by step, drops earlier state in some of these paths, and lets the
state decay at padding. Here one form serves prompts, steps and anything between, and padding leaves a state
unchanged. So the model's own forward is correct when its function for prompts is replaced.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from gralora_fx.core.operators.layers import RmsNorm
from gralora_fx.features.states.cached_states import conv_read
from gralora_fx.features.states.operators import CausalConv, GatedRmsNorm, LinearAttention, PromptClamp
from gralora_fx.features.states.recognised import SILU


def shown(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero a tensor `[batch, length, ...]` where the mask's last columns are zero."""
    if mask is None:
        return x
    return x * mask[:, mask.shape[1] - x.shape[1] :].unsqueeze(-1).to(x.dtype)


def _convolved(module: Any, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """Return a layer's causal convolution with its activation, continuing from the cache, which is updated.

    transformers keeps as many inputs as the kernel has, one more than are read; the cache's width stays as it is. `x`
    is `[batch, length, channels]`, output of `in_proj`, whose inputs at padding are zeros.
    """
    before, read = _state(cache, module.layer_idx, "conv_states"), module.conv1d.kernel_size[0] - 1
    # a projection without a bias gives zeros at padding
    inputs = (x if module.in_proj.bias is None else shown(x, mask)).transpose(1, 2)
    is_silu = module.activation in SILU
    y, state = CausalConv.compute_with_state(
        x=inputs,
        weight=module.conv1d.weight,
        bias=module.conv1d.bias,
        state=None if before is None else before[..., before.shape[-1] - read :],
        silu=is_silu,
    )
    if cache is not None:
        kept = inputs.new_zeros(*inputs.shape[:2], read + 1) if before is None else before
        if kept.shape[-1] > read:
            last = torch.cat([kept, inputs], dim=-1)
            state = last[..., last.shape[-1] - kept.shape[-1] :]
        _keep(cache, module.layer_idx, "conv_states", state)
    y = y.transpose(1, 2)
    return shown(y if is_silu else module.act(y), mask)


def _state(cache: Any, layer: int, kind: str) -> Tensor | None:
    """Return a layer's `conv_states` or `recurrent_states` from the cache; None before the first call."""
    return None if cache is None else getattr(cache.layers[layer], kind)[0]


def _keep(cache: Any, layer: int, kind: str, state: Tensor) -> None:
    held = cache.layers[layer]
    getattr(held, kind)[0] = state
    getattr(held, f"is_{kind}_initialized")[0] = held.has_previous_state[0] = True


def _scan(
    module: Any, cache: Any, before: Tensor | None, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
) -> Tensor:
    """Run linear attention on a layer's recurrent state, kept by transformers as `[batch, ..., value, key size]`."""
    y, state = LinearAttention.compute_with_state(
        query=query, key=key, value=value, decay=decay, beta=None, state=before, scale=1.0
    )
    if cache is not None:
        state = state.reshape(state.shape[0], *module.A_log.shape) if value.shape[3] == 1 else state.transpose(2, 3)
        _keep(cache, module.layer_idx, "recurrent_states", state)
    return y


def _before(module: Any, cache: Any, heads: int) -> Tensor | None:
    """Return a layer's recurrent state for `LinearAttention`, or None; each channel may be a head of width 1."""
    state = _state(cache, module.layer_idx, "recurrent_states")
    if state is None:
        return None
    return state.transpose(2, 3) if module.A_log.ndim == 1 else state.reshape(state.shape[0], heads, -1, 1)


def _heads(x: Tensor, count: int) -> Tensor:
    """Split `[..., count * size]` into `[..., count, size]`."""
    return torch.unflatten(x, -1, (count, x.shape[-1] // count))


def mamba2(
    module: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """Compute a Mamba2 layer: state space duality, of "Transformers are SSMs", https://arxiv.org/abs/2405.21060.

    Queries are its C, keys its B, values its x times a time step, and the decay is its A times the time step.
    """
    heads, groups, width = module.num_heads, module.n_groups, module.n_groups * module.ssm_state_size
    hidden_states = shown(hidden_states, attention_mask)
    if hasattr(module, "mup_vector"):  # Falcon-H1's multipliers
        projected = module.in_proj(hidden_states * module.ssm_in_multiplier) * module.mup_vector
    else:
        projected = module.in_proj(hidden_states)
    gate, mixed, step = projected.split([module.intermediate_size, module.conv_dim, heads], dim=-1)
    mixed = _convolved(module, mixed, cache, attention_mask)
    x, key, query = torch.split(mixed, [module.intermediate_size, width, width], dim=-1)
    step = nn.functional.softplus(step + module.dt_bias)
    before = _before(module, cache, heads)
    step = shown(_limited(module, step, before), attention_mask)
    x = _heads(x, heads)
    y = _scan(
        module,
        cache,
        before,
        query=_heads(query, groups),
        key=_heads(key, groups),
        value=x * step.unsqueeze(-1),
        decay=-torch.exp(module.A_log.float()) * step,
    )
    y = (y + x * module.D.unsqueeze(-1)).flatten(-2)
    y = module.norm(y, gate) if getattr(module, "mamba_rms_norm", True) else y * nn.functional.silu(gate)
    result: Tensor = module.out_proj(y.to(hidden_states.dtype))
    return result


def _limited(module: Any, step: Tensor, before: Tensor | None) -> Tensor:
    """Clamp time steps to a layer's limits: transformers clamps those of prompts, not of single tokens."""
    least, largest = module.time_step_limit
    if least <= 0 and largest == math.inf:  # the limits of softplus itself
        return step
    if before is None:
        return step.clamp(least, largest)
    return PromptClamp.compute(x=step, state=before, least=least, largest=largest)


def mamba(
    module: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """Compute a layer of Mamba (https://arxiv.org/abs/2312.00752), FalconMamba or Jamba."""
    mixed, gate = module.in_proj(shown(hidden_states, attention_mask)).chunk(2, dim=-1)
    mixed = _convolved(module, mixed, cache, attention_mask)
    parts = module.x_proj(mixed).split([module.time_step_rank, module.ssm_state_size, module.ssm_state_size], dim=-1)
    if hasattr(module, "dt_layernorm"):
        norms = module.dt_layernorm, module.b_layernorm, module.c_layernorm
        parts = [norm(part) for norm, part in zip(norms, parts, strict=True)]
    step, key, query = parts
    step = (module.dt_proj.weight @ step.transpose(1, 2)).transpose(1, 2) + module.dt_proj.bias
    return _selected(module, cache, attention_mask, mixed, gate, step, key.unsqueeze(2), query.unsqueeze(2))


def zamba(
    module: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """Compute a layer of Zamba: Mamba with several heads, each with its own weights."""
    mixed, gate = module.in_proj(shown(hidden_states, attention_mask)).unflatten(-1, (-1, 2)).unbind(dim=-1)
    mixed = _convolved(module, mixed, cache, attention_mask)
    by_head = _heads(mixed, module.n_mamba_heads).unsqueeze(-2)
    parts = (by_head @ module.x_proj_weight.transpose(1, 2)).squeeze(-2)
    step, key, query = parts.split([module.time_step_rank, module.ssm_state_size, module.ssm_state_size], dim=-1)
    step = (step.unsqueeze(-2) @ module.dt_proj_weight.transpose(1, 2)).squeeze(-2) + module.dt_proj_bias
    return _selected(module, cache, attention_mask, mixed, gate, step.flatten(-2), key, query)


def _selected(
    module: Any, cache: Any, mask: Tensor | None, x: Tensor, gate: Tensor, step: Tensor, key: Tensor, query: Tensor
) -> Tensor:
    """Compute a selective scan: each channel is a head with values of one number and a decay for each key.

    `x`, `gate` and `step`, time steps before softplus, are `[batch, length, channels]`; `key` and `query` are
    `[batch, length, heads, state size]`, where heads divide channels.
    """
    step = shown(nn.functional.softplus(step), mask)
    decay = -torch.exp(module.A_log.float()).reshape(-1, module.ssm_state_size)
    before = _before(module, cache, x.shape[-1])
    y = _scan(module, cache, before, query, key, (x * step).unsqueeze(-1), step.unsqueeze(-1) * decay)
    y = (y.squeeze(-1) + x * module.D.flatten()) * nn.functional.silu(gate)
    result: Tensor = module.out_proj(y.to(x.dtype))
    return result


def norm_of_gated(module: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """Compute Mamba2's norm, over groups of the gated values."""
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    wide = wide if gate is None else wide * nn.functional.silu(gate.to(wide.dtype))
    groups = wide.shape[-1] // module.group_size
    if groups > 1:
        wide = _heads(wide, groups)
    normed = RmsNorm.compute(x=wide, weight=None if groups > 1 else module.weight, eps=module.variance_epsilon)
    return (normed if groups == 1 else module.weight * normed.flatten(-2)).to(hidden_states.dtype)


def gate_of_normed(module: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Compute the norm of delta rules, with the gate, SiLU or sigmoid, applied after it."""
    return GatedRmsNorm.compute(
        x=hidden_states, weight=module.weight, gate=gate, eps=module.variance_epsilon, silu=module.activation in SILU
    )


_L2_EPS = 1e-6  # added to a sum of squares by transformers


def convolve(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Convolve each channel causally, `[batch, channels, length]`, with its activation.

    If the input is a read of a cache, kept inputs and new ones, only results for the new ones are returned.
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
    """Compute the gated delta rule, https://arxiv.org/abs/2412.06464, or per key Kimi's delta attention."""
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    y, state = LinearAttention.compute_with_state(
        query=query, key=key, value=value, decay=g, beta=beta, state=initial_state, scale=query.shape[-1] ** -0.5
    )
    return y, state if output_final_state else None


def _unit(x: Tensor) -> Tensor:
    """Normalise vectors to length 1: an RMS norm of weight `size ** -0.5`, whose epsilon is of the mean of squares."""
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
    """Compute MiniMax's lightning attention, https://arxiv.org/abs/2401.04658: each head's state decays by a constant.

    transformers lets it decay at padding too; here padding leaves it unchanged.
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
