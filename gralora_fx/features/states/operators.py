"""Operators of layers with a state: linear attention, causal convolution, gated norm, clamps of prompts.

Linear attention keeps a state of keys times values instead of a cache of them. Mamba2, the gated delta rule, Kimi's
delta attention, lightning attention and Mamba's selective scan are this operator with other arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gralora_fx.core.operators.call import Call, V, operator
from gralora_fx.core.operators.layers import RmsNorm

__all__ = ["CausalConv", "GatedRmsNorm", "LinearAttention", "PromptClamp"]  # importing this module defines them


@operator("causal_conv")
class CausalConv(Call[V]):
    """`gralora::causal_conv`: a causal depthwise convolution that continues from earlier calls' last inputs.

    Like ONNX Runtime's `CausalConvWithState`. The results are a tensor like `x`, and the last `kernel - 1` inputs of
    the sequence, including those of `state`, for the next call. Inputs of padding before a sequence must be zeros.
    """

    x: V  # `[batch, channels, length]`
    weight: V  # `[channels, 1, kernel]`; its last column is of the position itself
    bias: V | None  # `[channels]`, or None
    state: V | None  # `[batch, channels, kernel - 1]`, the inputs before `x`, or None for zeros
    silu: bool  # whether the result is `z * sigmoid(z)` of the convolution `z`

    def result(self: CausalConv[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the reference with PyTorch operators."""
        joined = torch.cat([self._initial(), self.x], dim=-1)
        y = nn.functional.conv1d(joined.to(self.weight.dtype), self.weight, self.bias, groups=self.weight.shape[0])
        y = nn.functional.silu(y) if self.silu else y
        return y.to(self.x.dtype), joined[..., joined.shape[-1] - (self.weight.shape[-1] - 1) :].contiguous()

    def shape_only(self: CausalConv[Tensor]) -> tuple[Tensor, Tensor]:
        """Return empty tensors of the results' shapes."""
        return torch.empty_like(self.x), torch.empty_like(self._initial())

    def _initial(self: CausalConv[Tensor]) -> Tensor:
        if self.state is not None:
            return self.state
        return self.x.new_zeros(self.x.shape[0], self.x.shape[1], self.weight.shape[-1] - 1)


@operator("gated_rms_norm")
class GatedRmsNorm(Call[V]):
    """`gralora::gated_rms_norm`: `x / sqrt(mean(x ** 2) + eps) * weight * f(gate)` over the last axis.

    Like ONNX Runtime's `GatedRMSNorm`; the result has the shape and dtype of `x`, and is computed in float32.
    """

    x: V  # `[..., size]`
    weight: V  # `[size]`
    gate: V  # like `x`
    eps: float  # added to the mean
    silu: bool  # whether `f(z)` is `z * sigmoid(z)` rather than `sigmoid(z)`

    def result(self: GatedRmsNorm[Tensor]) -> Tensor:
        """Compute the reference with PyTorch operators."""
        normed = RmsNorm(self.x, self.weight, self.eps).result()
        wide = torch.promote_types(self.x.dtype, torch.float32)
        activation = nn.functional.silu if self.silu else torch.sigmoid
        return (normed.to(wide) * activation(self.gate.to(wide))).to(self.x.dtype)

    def shape_only(self: GatedRmsNorm[Tensor]) -> Tensor:
        """Return an empty tensor of the result's shape."""
        return torch.empty_like(self.x)


@operator("prompt_clamp")
class PromptClamp(Call[V]):
    """`gralora::prompt_clamp`: `x` clamped in rows that read a prompt, unchanged in rows that read one token.

    transformers clamps the time steps of Mamba2's layers so: those of several tokens, and that of a single one with no
    state before it.
    """

    x: V  # `[batch, length, size]`
    state: V  # `[batch, ...]`, a recurrence's sum over earlier tokens; zeros for none
    least: float  # the lower limit
    largest: float  # the upper limit

    def result(self: PromptClamp[Tensor]) -> Tensor:
        """Compute the reference with PyTorch operators."""
        # no branch, so that any length works; integers, so that a verification adds no rounding noise
        is_several = self.x.new_ones(self.x.shape[1], dtype=torch.int64).sum() > 1
        is_prompt = is_several | (self.state == 0).flatten(1).all(1)
        return torch.where(is_prompt[:, None, None], self.x.clamp(self.least, self.largest), self.x)

    def shape_only(self: PromptClamp[Tensor]) -> Tensor:
        """Return an empty tensor of the result's shape."""
        return torch.empty_like(self.x)


# chunk lengths; a decay for each key takes memory for each
_CHUNK, _CHUNK_PER_KEY, _CHUNK_OF_NUMBERS = 64, 16, 32
_LEAST = -70.0  # e ** -70 is 4e-31, and float32's least normal number 1e-38


@operator("linear_attention")
class LinearAttention(Call[V]):
    """`gralora::linear_attention`: for each position, a state is decayed and updated, and a query reads it.

        S = exp(decay) * S                  with a decay
        S = S + key x u                     u = value, or with a beta: u = beta * (value - S.T @ key)
        y = scale * S.T @ query

    As `LinearAttention` of ONNX Runtime, whose update rule (`linear`, `gated`, `delta` or `gated_delta`) says whether
    there is a decay, and whether there is a beta. The chunks are those of "Parallelizing Linear Transformers with the
    Delta Rule over Sequence Length", https://arxiv.org/abs/2406.06484, and "Gated Delta Networks",
    https://arxiv.org/abs/2412.06464. A position with key 0, decay 0 and beta 0 leaves the state as it is.

    The results are `[batch, length, heads, value size]`, as `value`, and the next state.
    """

    # `[batch, length, query heads, key size]`. Consecutive heads share a query, or a state, where they differ in
    # number; `heads` of the result is the larger number.
    query: V
    key: V  # `[batch, length, key heads, key size]`; key heads divide those of the state
    value: V  # `[batch, length, state heads, value size]`
    # logarithm of the state's decay, 0 or less: `[batch, length, state heads]`, or with an axis of key size behind for
    # one of each key. None for no decay.
    decay: V | None
    # `[batch, length, state heads]`, the rate at which a value that the state predicts is replaced. None to add values
    # up.
    beta: V | None
    state: V | None  # `[batch, state heads, key size, value size]`, or None for zeros in float32
    scale: float  # factor of the result

    def result(self: LinearAttention[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the reference with PyTorch operators, in float32 or better, for any length."""
        if self.beta is None and self.decay is not None and self.decay.ndim == 4 and self.value.shape[3] == 1:
            return self._of_numbers(self.decay)
        heads, length = self.value.shape[2], self.query.shape[1]
        shared = max(1, self.query.shape[2] // heads)  # queries that read one state
        query = self.query.repeat_interleave(max(1, heads // self.query.shape[2]), 2)
        query = query.reshape(*query.shape[:2], heads, shared, query.shape[3])
        key = self.key.repeat_interleave(heads // self.key.shape[2], 2)
        size = _chunk_size(length, _CHUNK_PER_KEY if self.decay is not None and self.decay.ndim == 4 else _CHUNK)
        chunks = max(1, int((length + size - 1) // size))
        queries, keys, values = (_in_chunks(x, chunks, size) for x in (query, key, self.value))
        decays = None if self.decay is None else _in_chunks(self.decay, chunks, size).cumsum(3)
        if decays is not None and decays.ndim == 4:
            decays = decays.unsqueeze(-1)
        betas = None if self.beta is None else _in_chunks(self.beta, chunks, size).unsqueeze(-1)
        state, results = self._initial(queries.dtype), []
        for at in range(chunks):
            decay, beta = (None if parts is None else parts[at] for parts in (decays, betas))
            # `[batch, heads, length, shared, size]` to `[batch, heads, shared, length, size]`
            result, state = _chunk(queries[at].transpose(2, 3), keys[at], values[at], decay, beta, state)
            results.append(result)
        y = torch.cat(results, 3)[:, :, :, :length].flatten(1, 2).transpose(1, 2)
        dtype = torch.float32 if self.state is None else self.state.dtype
        return (self.scale * y).to(self.value.dtype).contiguous(), state.to(dtype)

    def _of_numbers(self: LinearAttention[Tensor], decay: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the same for scalar values, as in Mamba: chunks in parallel from zero, then earlier states added."""
        heads, length = self.value.shape[2], self.value.shape[1]
        size = _chunk_size(length, _CHUNK_OF_NUMBERS)
        chunks = max(1, int((length + size - 1) // size))
        written = self.key.repeat_interleave(heads // self.key.shape[2], 2) * self.value
        # `[chunks, batch, heads, size, key size]`
        decays, parts = (_in_chunks(x, chunks, size) for x in (decay, written))
        states = [parts[:, :, :, 0]]
        for factor, part in zip(decays.exp().unbind(3)[1:], parts.unbind(3)[1:], strict=True):
            states.append(torch.addcmul(part, factor, states[-1]))
        since = decays.cumsum(3).exp()
        before = [self._initial(decays.dtype).squeeze(-1)]
        for chunk, last in zip(since[:, :, :, -1], states[-1], strict=True):
            before.append(torch.addcmul(last, chunk, before[-1]))
        states_of_all = torch.addcmul(torch.stack(states, 3), since, torch.stack(before[:-1]).unsqueeze(3))
        states_of_all = states_of_all.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
        groups = min(heads, self.query.shape[2])  # of states that a query reads, or of queries that read a state
        read, query = (torch.unflatten(x, 2, (groups, x.shape[2] // groups)) for x in (states_of_all, self.query))
        y = (read * query).sum(-1).flatten(2).unsqueeze(-1)
        dtype = torch.float32 if self.state is None else self.state.dtype
        return (self.scale * y).to(self.value.dtype), before[-1].unsqueeze(-1).to(dtype)

    def shape_only(self: LinearAttention[Tensor]) -> tuple[Tensor, Tensor]:
        """Return empty tensors of the results' shapes."""
        batch, length, heads, size = self.value.shape
        state = self._initial(torch.float32) if self.state is None else self.state
        y = self.value.new_empty(batch, length, max(heads, self.query.shape[2]), size)
        return y, torch.empty_like(state)

    def _initial(self: LinearAttention[Tensor], dtype: torch.dtype) -> Tensor:
        if self.state is not None:
            return self.state.to(dtype)
        batch, _, heads, size = self.value.shape
        return self.value.new_zeros(batch, heads, self.key.shape[-1], size, dtype=dtype)


def _chunk_size(length: int | torch.SymInt, most: int) -> int:
    """Return a chunk's positions: at most the length, so that a single token does not cost a chunk."""
    return max(1, min(length, most)) if isinstance(length, int) else most


def _in_chunks(x: Tensor, chunks: int, size: int) -> Tensor:
    """Split `[batch, length, heads, ...]` into `[chunks, batch, heads, size, ...]`, zero-padded, at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = nn.functional.pad(wide, (0, 0) * (x.ndim - 2) + (0, chunks * size - x.shape[1]))
    return padded.reshape(x.shape[0], chunks, size, *x.shape[2:]).transpose(0, 1).transpose(2, 3)


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a chunk's outputs of linear attention, and the next state `[batch, heads, key size, value size]`.

    Keys and values are `[batch, heads, length, size]`, queries `[batch, heads, shared, length, size]`, betas
    `[batch, heads, length, 1]`, and decays, sums of logarithms from the chunk's start,
    `[batch, heads, length, 1 or key size]`.
    """
    later = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).triu(1)
    left = None  # remaining share of a position's write at a later one: [batch, heads, length, length, 1 or key size]
    if decay is not None:
        left = decay.unsqueeze(3) - decay.unsqueeze(2)
        left = _share(left.masked_fill(later.unsqueeze(-1), float("-inf")))
    before = key if decay is None else key * _share(decay)  # keys that read the state before the chunk
    written = value
    if beta is not None:
        predicted = beta * _products(key, key, left, later)
        known = beta * (value - before @ state)
        written = torch.linalg.solve_triangular(predicted, known, upper=False, unitriangular=True)
    seen = _products(query, key.unsqueeze(2), None if left is None else left.unsqueeze(2), later)
    reading = query if decay is None else query * _share(decay).unsqueeze(2)
    y = seen @ written.unsqueeze(2) + reading @ state.unsqueeze(2)
    if decay is None:
        return y, state + key.transpose(-1, -2) @ written
    end = decay[:, :, -1:]
    return y, state * _share(end).transpose(-1, -2) + (key * _share(end - decay)).transpose(-1, -2) @ written


def _share(decay: Tensor) -> Tensor:
    """Return `exp(decay)`, zero below `_LEAST`, where products would be denormal and slow."""
    return decay.masked_fill(decay < _LEAST, float("-inf")).exp()


def _products(one: Tensor, key: Tensor, left: Tensor | None, later: Tensor) -> Tensor:
    """Return products of positions with their own and earlier keys, `[..., length, length]`."""
    if left is not None and left.shape[-1] > 1:
        return torch.einsum("...ik,...jk,...ijk->...ij", one, key, left)
    products = one @ key.transpose(-1, -2)
    return products.masked_fill(later, 0.0) if left is None else products * left.squeeze(-1)
