"""Folds weight updates of any method into a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from gralora_fx.core.methods.arrays import Array, accumulator_of, cast, is_numpy, to_numpy, to_torch, without_gradients
from gralora_fx.core.methods.method import Update, WeightTensors, first_tensor, is_low_rank, needs_weight

if TYPE_CHECKING:
    from torch import Tensor


@without_gradients
def fold(weight: Tensor, updates: Sequence[Update], *, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """Fold updates into a weight, block by block, without another tensor of the weight's size beside the result.

    The weight is `[out, in]`, or `[in, out]` if `transposed`, with a stack's axis before; it is only read unless it is
    `out`, the result's memory. Half precision is accumulated in float32, one block at a time, and rounded once.
    """
    import torch

    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    if weight.ndim == 3:
        for index, matrix in enumerate(weight):
            fold(matrix, [update.matrix(index) for update in updates], transposed=transposed, out=result[index])
        return result
    source, target = (weight.t(), result.t()) if transposed else (weight, result)
    everything = slice(0, source.shape[0]), slice(0, source.shape[1])
    _fold_region(source, target, updates, everything, source.shape)
    return result


@without_gradients
def fold_region(part: Array, updates: Sequence[Update], rows: slice, columns: slice, shape: Sequence[int]) -> None:
    """Fold updates of a weight `[out, in]`, its `shape`, into a part of it, in place; otherwise as `fold`.

    The part is `weight[rows, columns]`, or a view; slices have start and stop. An update that is not of low rank needs
    the whole weight.
    """
    _fold_region(part, part, updates, (rows, columns), shape)


def _fold_region(
    source: Array, target: Array, updates: Sequence[Update], region: tuple[slice, slice], shape: Sequence[int]
) -> None:
    """Fold updates into a region of a weight, from `source` to `target`.

    Updates of low rank are added one block of their grid at a time; others need the whole weight, and come first.
    """
    accumulator = accumulator_of(source)
    (top, bottom), (left, right) = ((part.start, part.stop) for part in region)
    for update in updates:
        if needs_weight(update.factors):
            assert (top, bottom, left, right) == (0, shape[0], 0, shape[1]), "an update that needs the whole weight"
            source = _new_weight(cast(source, accumulator), update.factors, update.scale)
    summands = [(u.factors, u.scale) for u in updates if is_low_rank(u.factors)]
    grid = math.lcm(*(factors.grid for factors, _ in summands))
    for rows, columns in product(_cut(top, bottom, shape[0] // grid), _cut(left, right, shape[1] // grid)):
        within = slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)
        block = slice(*rows), slice(*columns)
        terms = [(*pair, scale) for factors, scale in summands for pair in factors.products(*block, shape)]
        _add_products(source[within], terms, accumulator, target[within])


def _new_weight(weight: Array, factors: WeightTensors, scale: float) -> Array:
    """Return the new weight, in the old one's library whichever the tensors are of."""
    if is_numpy(weight) == is_numpy(first_tensor(factors)):
        return factors.new_weight(weight, scale)
    return to_numpy(factors.new_weight(to_torch(weight), scale))


def _add_products(block: Array, terms: Sequence[tuple[Array, Array, float]], accumulator: Any, into: Array) -> None:
    """Compute `into = block + sum of scale * left @ right`, accumulated in the accumulator's dtype and rounded once."""
    if is_numpy(block):
        sums = block.astype(accumulator)
        for left, right, scale in terms:
            sums += scale * (cast(to_numpy(left), accumulator) @ cast(to_numpy(right), accumulator))
        with np.errstate(over="ignore"):  # the caller checks that values are finite
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
