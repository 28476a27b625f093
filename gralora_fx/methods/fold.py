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
    everything = slice(0, source.shape[0]), slice(0, source.shape[1])
    _fold_region(source, target, updates, everything, source.shape)
    return result


@torch.no_grad()
def fold_region(part: Tensor, updates: Sequence[Update], rows: slice, columns: slice, shape: Sequence[int]) -> None:
    """Fold updates into a part of a weight, in place; otherwise as `fold`.

    Args:
        part: `[rows, columns]` of the weight; it may be a view.
        updates: The updates of the whole weight.
        rows: Output features of the part, with start and stop.
        columns: Input features of the part, with start and stop.
        shape: `[out, in]` of the whole weight.
    """
    _fold_region(part, part, updates, (rows, columns), shape)


def _fold_region(
    source: Tensor, target: Tensor, updates: Sequence[Update], region: tuple[slice, slice], shape: Sequence[int]
) -> None:
    """Fold into `target` what `source` holds of a region, one block of the updates' grid at a time."""
    accumulator = torch.promote_types(source.dtype, torch.float32)
    grid = math.lcm(*(update.factors.grid for update in updates))
    first_row, first_column = region[0].start, region[1].start
    for rows, columns in product(_slices(shape[0], grid, region[0]), _slices(shape[1], grid, region[1])):
        within = (
            slice(rows.start - first_row, rows.stop - first_row),
            slice(columns.start - first_column, columns.stop - first_column),
        )
        block, into = source[within], target[within]
        terms = [
            (left, right, update.scale)
            for update in updates
            for left, right in update.factors.products(rows, columns, shape)
        ]
        if accumulator == source.dtype:
            for left, right, scale in terms:
                torch.addmm(block, left.to(accumulator), right.to(accumulator), alpha=scale, out=into)
                block = into
        else:
            total = block.to(accumulator)
            for left, right, scale in terms:
                total.addmm_(left.to(accumulator), right.to(accumulator), alpha=scale)
            into.copy_(total)


@torch.no_grad()
def delta_weight(update: Update, *, transposed: bool = False) -> Tensor:
    """The update as a dense matrix, `[out, in]`, or `[in, out]` if `transposed`."""
    in_features, out_features = update.factors.features
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    tensor = first_tensor(update.factors)
    zero = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return fold(zero, [update], transposed=transposed, out=zero)


def _slices(size: int, parts: int, within: slice) -> Iterator[slice]:
    """What lies within a range of each of several equal parts."""
    width = size // parts
    for part in range(parts):
        start, stop = max(part * width, within.start), min((part + 1) * width, within.stop)
        if start < stop:
            yield slice(start, stop)
