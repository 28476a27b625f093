"""Fold weight updates into a weight, whatever their method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from gralora_fx.methods.method import Update, first_tensor


@torch.no_grad()
def fold(weight: Tensor, updates: Sequence[Update], *, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """Fold updates into a weight, block by block, without a tensor of the weight's size beside the result.

    Half-precision weights are accumulated in float32 one block at a time and rounded once.

    Args:
        weight: `[out, in]`, or `[in, out]` if `transposed`; read only.
        updates: The updates to add; their methods and sizes may differ.
        transposed: Whether the weight is stored `[in, out]`.
        out: Where to write, of the weight's shape and dtype; the weight itself folds in place. None makes a tensor.

    Returns:
        `weight + sum of scale * update`, in `out`.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    source, target = (weight.t(), result.t()) if transposed else (weight, result)
    accumulator = torch.promote_types(weight.dtype, torch.float32)
    grid = math.lcm(*(update.factors.grid for update in updates))
    for rows, columns in product(_slices(source.shape[0], grid), _slices(source.shape[1], grid)):
        block, into = source[rows, columns], target[rows, columns]
        terms = [
            (left, right, update.scale)
            for update in updates
            for left, right in update.factors.products(rows, columns, source.shape)
        ]
        if accumulator == weight.dtype:
            for left, right, scale in terms:
                torch.addmm(block, left.to(accumulator), right.to(accumulator), alpha=scale, out=into)
                block = into
        else:
            total = block.to(accumulator)
            for left, right, scale in terms:
                total.addmm_(left.to(accumulator), right.to(accumulator), alpha=scale)
            into.copy_(total)
    return result


@torch.no_grad()
def delta_weight(update: Update, *, transposed: bool = False) -> Tensor:
    """The update as a dense matrix, `[out, in]`, or `[in, out]` if `transposed`."""
    in_features, out_features = update.factors.features
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    tensor = first_tensor(update.factors)
    zero = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return fold(zero, [update], transposed=transposed, out=zero)


def _slices(size: int, parts: int) -> Iterator[slice]:
    width = size // parts
    return (slice(part * width, (part + 1) * width) for part in range(parts))
