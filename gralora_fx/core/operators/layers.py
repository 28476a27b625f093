"""The operators beside attention: normalization, rotary embedding, stochastic depth, and reshapes of constant size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gralora_fx.core.operators.call import Call, V, operator


@operator("rms_norm")
class RmsNorm(Call[V]):
    """`gralora::rms_norm`: `x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, as Llama computes it.

    The result has the shape of `x`; the norm is computed in float32.
    """

    x: V  # `[..., size]`
    weight: V | None  # `[size]`, or None for ones
    eps: float  # added to the mean

    def result(self: RmsNorm[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        wide = self.x.to(torch.float32) if self.x.dtype != torch.float64 else self.x
        result = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(self.x.dtype)
        return result if self.weight is None else self.weight * result

    def shape_only(self: RmsNorm[Tensor]) -> Tensor:
        """Return an empty tensor of the shape."""
        dtype = self.x.dtype if self.weight is None else torch.promote_types(self.x.dtype, self.weight.dtype)
        return torch.empty_like(self.x, dtype=dtype)


@operator("rotate")
class Rotate(Call[V]):
    """`gralora::rotate`: rotary embedding of the halves of the last axis, as in Llama's code; shaped like `x`."""

    x: V  # `[batch, heads, length, size]`, or `[batch, length, heads, size]`
    cos: V  # `[batch, length, size]`
    sin: V  # as `cos`
    axis: int  # position of the heads axis

    def result(self: Rotate[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        half = self.x.shape[-1] // 2
        turned = torch.cat((-self.x[..., half:], self.x[..., :half]), dim=-1)
        return self.x * self.cos.unsqueeze(self.axis) + turned * self.sin.unsqueeze(self.axis)

    def shape_only(self: Rotate[Tensor]) -> Tensor:
        """Return an empty tensor of the shape."""
        return torch.empty_like(self.x)


@operator("rotary")
class Rotary(Call[V]):
    """`gralora::rotary`: rotary position embedding in the form of runtimes; each position rotates pairs by its angles.

    The result has the shape of `x`.
    """

    x: V  # `[batch, heads, length, size]`
    cos: V  # `[batch, length, half]`; the first 2 * half of `size` are rotated
    sin: V  # as `cos`
    interleaved: bool  # whether pairs are neighbours, rather than one member from each half

    def result(self: Rotary[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        size = 2 * self.cos.shape[-1]
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
        rotated, rest = self.x[..., :size], self.x[..., size:]
        if self.interleaved:
            first, second = rotated[..., ::2], rotated[..., 1::2]
            rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        else:
            first, second = rotated.chunk(2, dim=-1)
            rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([rotated, rest], dim=-1)


@operator("drop_path", tags=(torch.Tag.nondeterministic_seeded,), train="train")
class DropPath(Call[V]):
    """`gralora::drop_path`: stochastic depth. In training samples are zeroed at random, and the others scaled up.

    From "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382; a generator in the same state gives
    the draws of transformers' models. The result has the shape of `x`.
    """

    x: V  # `[batch, ...]`, the output of a residual branch
    p: float  # probability of dropping a sample, in `[0, 1)`
    train: bool  # whether to drop; otherwise `x` itself is returned

    def result(self: DropPath[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        if not self.train or self.p == 0.0:
            return self.x
        sizes = (self.x.shape[0],) + (1,) * (self.x.ndim - 1)
        survives = torch.floor(torch.rand(sizes, dtype=self.x.dtype, device=self.x.device) + (1 - self.p))
        return self.x.div(1 - self.p) * survives


@operator("reshape")
class Reshape(Call[V]):
    """`gralora::reshape`: PyTorch's own with constant sizes, as ONNX can store them."""

    x: V  # any tensor
    shape: Sequence[int]  # the new sizes; 0 keeps an axis, and at most one -1 takes the rest

    def result(self: Reshape[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        return self.x.reshape([self.x.shape[axis] if size == 0 else size for axis, size in enumerate(self.shape)])


@operator("slice")
class Slice(Call[V]):
    """`gralora::slice`: `x[..., start:stop:step]` along an axis with constant limits, as ONNX can store them."""

    x: V  # any tensor
    axis: int
    start: int  # start of the slice
    stop: int  # end of the slice
    step: int

    def result(self: Slice[Tensor]) -> Tensor:
        """Compute the reference with PyTorch's own operators."""
        return torch.ops.aten.slice.Tensor(self.x, self.axis, self.start, self.stop, self.step)  # type: ignore[no-any-return]
