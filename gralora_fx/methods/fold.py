"""Fold weight updates into a weight, whatever their method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from gralora_fx.methods.arrays import Array, accumulator_of, cast, is_numpy, norm, to_numpy, without_gradients
from gralora_fx.methods.method import Update, first_tensor

if TYPE_CHECKING:
    from torch import Tensor


@without_gradients
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
    import torch

    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    source, target = (weight.t(), result.t()) if transposed else (weight, result)
    everything = slice(0, source.shape[0]), slice(0, source.shape[1])
    _fold_region(source, target, updates, everything, source.shape)
    return result


@without_gradients
def fold_region(part: Array, updates: Sequence[Update], rows: slice, columns: slice, shape: Sequence[int]) -> None:
    """Fold updates into a part of a weight, in place; otherwise as `fold`.

    Args:
        part: `[rows, columns]` of the weight; it may be a view.
        updates: The updates of the whole weight.
        rows: Output features of the part, with start and stop.
        columns: Input features of the part, with start and stop.
        shape: `[out, in]` of the whole weight.
    """
    _fold_region(part, part, updates, (rows, columns), shape)


@without_gradients
def fold_rows(
    rows: Array, updates: Sequence[Update], *, first: int, shape: Sequence[int], transposed: bool = False, out: Array
) -> None:
    """Fold updates into some consecutive rows of a stored weight, as `fold` does into all of them.

    Args:
        rows: `[n, shape[1]]`: the rows; read only.
        updates: The updates to add.
        first: Index of the first row.
        shape: Shape of the whole weight as it is stored: `[out, in]`, or `[in, out]` if `transposed`.
        transposed: Whether the weight is stored `[in, out]`.
        out: Where to write, of the shape and dtype of `rows`; `rows` itself folds in place.
    """
    stored = slice(first, first + rows.shape[0]), slice(0, shape[1])
    if transposed:
        _fold_region(rows.T, out.T, updates, stored[::-1], shape[::-1])
    else:
        _fold_region(rows, out, updates, stored, shape)


def _fold_region(
    source: Array, target: Array, updates: Sequence[Update], region: tuple[slice, slice], shape: Sequence[int]
) -> None:
    """Fold into `target` what `source` holds of a region, one block of the updates' grid at a time."""
    accumulator = accumulator_of(source)
    grid = math.lcm(*(update.factors.grid for update in updates))
    (top, bottom), (left, right) = ((part.start, part.stop) for part in region)
    for rows, columns in product(_cut(top, bottom, shape[0] // grid), _cut(left, right, shape[1] // grid)):
        within = slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)
        block = slice(*rows), slice(*columns)
        terms = [(*pair, update.scale) for update in updates for pair in update.factors.products(*block, shape)]
        _add_products(source[within], terms, accumulator, target[within])


@without_gradients
def largest_change(update: Update) -> float:
    """A bound for the absolute value of every entry of `scale * update`, from norms of its factors."""
    in_features, out_features = update.factors.features
    grid, shape = update.factors.grid, (out_features, in_features)
    blocks = product(_cut(0, out_features, out_features // grid), _cut(0, in_features, in_features // grid))
    largest = 0.0
    for rows, columns in blocks:
        pairs = update.factors.products(slice(*rows), slice(*columns), shape)
        largest = max(largest, sum((norm(left) * norm(right) for left, right in pairs), 0.0))
    return abs(update.scale) * largest


def _add_products(block: Array, terms: Sequence[tuple[Array, Array, float]], accumulator: Any, into: Array) -> None:
    """`into = block + sum of scale * left @ right`, added up in the accumulator's dtype and rounded once."""
    if is_numpy(block):
        sums = block.astype(accumulator)
        for left, right, scale in terms:
            sums += scale * (cast(to_numpy(left), accumulator) @ cast(to_numpy(right), accumulator))
        with np.errstate(over="ignore"):  # whether values are finite is for the caller to check
            into[...] = sums
        return
    import torch

    if accumulator == block.dtype:
        for left, right, scale in terms:
            torch.addmm(block, left.to(accumulator), right.to(accumulator), alpha=scale, out=into)
            block = into
        if block is not into:
            into.copy_(block)
        return
    total = block.to(accumulator)
    for left, right, scale in terms:
        total.addmm_(left.to(accumulator), right.to(accumulator), alpha=scale)
    into.copy_(total)


def _cut(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of a width."""
    while start < stop:
        end = min(stop, (start // width + 1) * width)
        yield start, end
        start = end


@without_gradients
def delta_weight(update: Update, *, transposed: bool = False) -> Tensor:
    """The update as a dense matrix, `[out, in]`, or `[in, out]` if `transposed`."""
    import torch

    in_features, out_features = update.factors.features
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    tensor = first_tensor(update.factors)
    zero = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return fold(zero, [update], transposed=transposed, out=zero)
