"""`gralora::rms_norm`: root-mean-square normalisation over the last axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gralora_fx.operators.call import Call
from gralora_fx.operators.namespace import define


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, as Llama computes it.

    Args:
        x: `[..., size]`.
        weight: `[size]`, or None for one of ones.
        eps: What is added to the mean.

    Returns:
        As `x`; the norm is computed in float32.
    """
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    result = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return result if weight is None else weight * result


def rms_norm_shape(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The shape-only counterpart of `rms_norm`."""
    return torch.empty_like(x, dtype=x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype))


@dataclass(frozen=True)
class RmsNorm(Call):
    """A call of `gralora::rms_norm`; `rms_norm` describes the arguments."""

    target: ClassVar[Any] = define(
        "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", rms_norm, shape=rms_norm_shape
    )

    x: fx.Node
    weight: fx.Node | None
    eps: float
