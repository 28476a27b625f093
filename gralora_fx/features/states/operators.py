"""Operators beside linear attention: a convolution with a state, a norm with a gate, limits of prompts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gralora_fx.core.operators.call import Call, V, operator
from gralora_fx.core.operators.layers import RmsNorm
from gralora_fx.features.states.linear_attention import LinearAttention

__all__ = ["CausalConv", "GatedRmsNorm", "LinearAttention", "PromptClamp"]  # those that importing this defines


@operator("causal_conv")
class CausalConv(Call[V]):
    """`gralora::causal_conv`: each channel convolved with its own kernel, over the last inputs of earlier calls too.

    As `CausalConvWithState` of ONNX Runtime. The results are as `x`, and the last `kernel - 1` inputs of the sequence,
    those of `state` included, which the next call takes. An input of zeros is what padding before a sequence has to be.

    Attributes:
        x: `[batch, channels, length]`.
        weight: `[channels, 1, kernel]`; its last column is of the position itself.
        bias: `[channels]`, or None.
        state: `[batch, channels, kernel - 1]`, the inputs before `x`, or None for zeros.
        silu: Whether the result is `z * sigmoid(z)` of the convolution `z`.
    """

    x: V
    weight: V
    bias: V | None
    state: V | None
    silu: bool

    def result(self: CausalConv[Tensor]) -> tuple[Tensor, Tensor]:
        """The reference, in PyTorch's own operators."""
        joined = torch.cat([self._initial(), self.x], dim=-1)
        y = nn.functional.conv1d(joined.to(self.weight.dtype), self.weight, self.bias, groups=self.weight.shape[0])
        y = nn.functional.silu(y) if self.silu else y
        return y.to(self.x.dtype), joined[..., joined.shape[-1] - (self.weight.shape[-1] - 1) :].contiguous()

    def shape_only(self: CausalConv[Tensor]) -> tuple[Tensor, Tensor]:
        """The shapes."""
        return torch.empty_like(self.x), torch.empty_like(self._initial())

    def _initial(self: CausalConv[Tensor]) -> Tensor:
        if self.state is not None:
            return self.state
        return self.x.new_zeros(self.x.shape[0], self.x.shape[1], self.weight.shape[-1] - 1)


@operator("gated_rms_norm")
class GatedRmsNorm(Call[V]):
    """`gralora::gated_rms_norm`: `x / sqrt(mean(x ** 2) + eps) * weight * f(gate)` over the last axis.

    As `GatedRMSNorm` of ONNX Runtime; the result is as `x`, and computed in float32.

    Attributes:
        x: `[..., size]`.
        weight: `[size]`.
        gate: As `x`.
        eps: What is added to the mean.
        silu: Whether `f(z)` is `z * sigmoid(z)` rather than `sigmoid(z)`.
    """

    x: V
    weight: V
    gate: V
    eps: float
    silu: bool

    def result(self: GatedRmsNorm[Tensor]) -> Tensor:
        """The reference, in PyTorch's own operators."""
        normed = RmsNorm(self.x, self.weight, self.eps).result()
        wide = torch.promote_types(self.x.dtype, torch.float32)
        activation = nn.functional.silu if self.silu else torch.sigmoid
        return (normed.to(wide) * activation(self.gate.to(wide))).to(self.x.dtype)

    def shape_only(self: GatedRmsNorm[Tensor]) -> Tensor:
        """The shape."""
        return torch.empty_like(self.x)


@operator("prompt_clamp")
class PromptClamp(Call[V]):
    """`gralora::prompt_clamp`: numbers within limits where a row reads a prompt, as they are where it reads one token.

    transformers limits the time steps of Mamba2's layers so: those of several tokens, and that of a single one with no
    state before it.

    Attributes:
        x: `[batch, length, size]`.
        state: `[batch, ...]`, what a recurrence has summed up of earlier tokens; zeros for none.
        least: The lower limit.
        largest: The upper limit.
    """

    x: V
    state: V
    least: float
    largest: float

    def result(self: PromptClamp[Tensor]) -> Tensor:
        """The reference, in PyTorch's own operators."""
        # no branch, so that the length may be any; integers, to which a verification adds no rounding noise
        is_several = self.x.new_ones(self.x.shape[1], dtype=torch.int64).sum() > 1
        is_prompt = is_several | (self.state == 0).flatten(1).all(1)
        return torch.where(is_prompt[:, None, None], self.x.clamp(self.least, self.largest), self.x)

    def shape_only(self: PromptClamp[Tensor]) -> Tensor:
        """The shape."""
        return torch.empty_like(self.x)
