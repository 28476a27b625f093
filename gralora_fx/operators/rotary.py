"""`gralora::rotate` and `gralora::rotary`: rotary position embedding, as models spell it and as runtimes take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gralora_fx.operators.call import Call
from gralora_fx.operators.namespace import define


def rotate(x: Tensor, cos: Tensor, sin: Tensor, axis: int) -> Tensor:
    """Rotate the halves of the last axis, as Llama does with queries and keys.

    Args:
        x: `[batch, heads, length, size]`, or `[batch, length, heads, size]`.
        cos: `[batch, length, size]`.
        sin: As `cos`.
        axis: Position of the heads axis.

    Returns:
        As `x`.
    """
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos.unsqueeze(axis) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(axis)


def rotate_shape(x: Tensor, cos: Tensor, sin: Tensor, axis: int) -> Tensor:
    """The shape-only counterpart of `rotate`."""
    return torch.empty_like(x)


@dataclass(frozen=True)
class Rotate(Call):
    """A call of `gralora::rotate`; `rotate` describes the arguments."""

    target: ClassVar[Any] = define(
        "rotate(Tensor x, Tensor cos, Tensor sin, int axis) -> Tensor", rotate, shape=rotate_shape
    )

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    axis: int


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of the last axis by an angle for each position.

    Args:
        x: `[batch, heads, length, size]`.
        cos: `[batch, length, half]`; the first 2 * half of `size` are rotated.
        sin: As `cos`.
        interleaved: Whether pairs are neighbours, rather than one member from each half.

    Returns:
        As `x`.
    """
    size = 2 * cos.shape[-1]
    cos, sin, rotated, rest = cos.unsqueeze(1), sin.unsqueeze(1), x[..., :size], x[..., size:]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated, rest], dim=-1)


@dataclass(frozen=True)
class Rotary(Call):
    """A call of `gralora::rotary`; `rotary` describes the arguments."""

    target: ClassVar[Any] = define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", rotary)

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
