"""`gralora::mask` and `gralora::mask_of_blocks`: the mask that a model makes for its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gralora_fx.operators.call import Call
from gralora_fx.operators.namespace import define


def causal_mask(padding: Tensor, length: int, window: int, dtype: torch.dtype) -> Tensor:
    """The additive causal mask: a position attends to itself and earlier ones, and to no padding.

    Args:
        padding: `[batch, past + length]`, 0 where a position is padding.
        length: Number of new positions.
        window: Number of positions that a position attends to, itself included; 0 for all.
        dtype: Dtype of the scores.

    Returns:
        `[batch, 1, length, past + length]`, 0 or the smallest number.
    """
    total = padding.shape[1]
    rows = torch.arange(length, device=padding.device).unsqueeze(1) + (total - length)
    columns = torch.arange(total, device=padding.device).unsqueeze(0)
    seen = columns <= rows
    if window:
        seen = seen & (columns > rows - window)
    seen = seen.unsqueeze(0).unsqueeze(0) & padding.bool().unsqueeze(1).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=padding.device).masked_fill(~seen, torch.finfo(dtype).min)


def mask_shape(padding: Tensor, length: int, window: int, dtype: torch.dtype) -> Tensor:
    """The shape-only counterpart of `causal_mask`."""
    return padding.new_empty((padding.shape[0], 1, length, padding.shape[1]), dtype=dtype)


@dataclass(frozen=True)
class Mask(Call):
    """A call of `gralora::mask`; `causal_mask` describes the arguments."""

    target: ClassVar[Any] = define(
        "mask(Tensor padding, SymInt length, int window, ScalarType dtype) -> Tensor", causal_mask, shape=mask_shape
    )

    padding: fx.Node
    length: fx.Node | int
    window: int
    dtype: torch.dtype


def mask_of_blocks(blocks: Tensor, plain: Tensor, whole: Tensor) -> Tensor:
    """The mask of a text with blocks, such as images, whose positions all attend to each other.

    A trace has both masks until it is known whether there are blocks (see `tracing.normalize.masks`).

    Args:
        blocks: `[batch, past + length]`, the index of each position's block, -1 for none.
        plain: The mask of a text without blocks, `[batch, 1, length, past + length]`.
        whole: The mask with blocks, shaped like `plain`.

    Returns:
        `whole`.
    """
    return whole.clone()


@dataclass(frozen=True)
class MaskOfBlocks(Call):
    """A call of `gralora::mask_of_blocks`; `mask_of_blocks` describes the arguments."""

    target: ClassVar[Any] = define(
        "mask_of_blocks(Tensor blocks, Tensor plain, Tensor whole) -> Tensor", mask_of_blocks
    )

    blocks: fx.Node
    plain: fx.Node
    whole: fx.Node
