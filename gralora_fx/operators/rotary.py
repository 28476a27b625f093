"""`gralora::rotate` and `gralora::rotary`: rotary position embedding, as models spell it and as runtimes take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gralora_fx.operators.call import Call
from gralora_fx.operators.namespace import define


def rotate(x: Tensor, cos: Tensor, sin: Tensor, axis: int) -> Tensor:
    """Turn the halves of the last axis against each other, as Llama does with queries and keys.

    Args:
        x: `[batch, heads, length, size]`, or with heads behind the length.
        cos: `[batch, length, size]`.
        sin: As `cos`.
        axis: Where the axis of heads is.

    Returns:
        As `x`.
    """
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos.unsqueeze(axis) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(axis)


def rotate_shape(x: Tensor, cos: Tensor, sin: Tensor, axis: int) -> Tensor:
    """A tensor of the shape of `rotate`'s result, without values."""
    return torch.empty_like(x)


@dataclass(frozen=True)
class Rotate(Call):
    """A call of `gralora::rotate`; what each argument is stands at `rotate`."""

    target: ClassVar[Any] = define(
        "rotate(Tensor x, Tensor cos, Tensor sin, int axis) -> Tensor", rotate, shape=rotate_shape
    )

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    axis: int


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of the last axis by an angle a position.

    Args:
        x: `[batch, heads, length, size]`.
        cos: `[batch, length, half]`; the first 2 * half of `size` are turned.
        sin: As `cos`.
        interleaved: Whether a pair are neighbours, or a member of the first half and one of the second.

    Returns:
        As `x`.
    """
    size = 2 * cos.shape[-1]
    cos, sin, turned, rest = cos.unsqueeze(1), sin.unsqueeze(1), x[..., :size], x[..., size:]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


@dataclass(frozen=True)
class Rotary(Call):
    """A call of `gralora::rotary`; what each argument is stands at `rotary`."""

    target: ClassVar[Any] = define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", rotary)

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
