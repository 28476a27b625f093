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
    fold_rows(weight, updates, first=0, shape=weight.shape, transposed=transposed, out=result)
    return result


@torch.no_grad()
def fold_rows(
    rows: Tensor, updates: Sequence[Update], *, first: int, shape: Sequence[int], transposed: bool = False, out: Tensor
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
    grid = math.lcm(*(update.factors.grid for update in updates))
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    features = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    height, width = shape[0] // grid, shape[1] // grid
    for (start, stop), (left, right) in product(_cut(first, first + rows.shape[0], height), _cut(0, shape[1], width)):
        source, target = (tensor[start - first : stop - first, left:right] for tensor in (rows, out))
        outputs, inputs = slice(start, stop), slice(left, right)
        if transposed:
            source, target, outputs, inputs = source.t(), target.t(), inputs, outputs
        terms = [(*pair, u.scale) for u in updates for pair in u.factors.products(outputs, inputs, features)]
        _add_products(source, terms, accumulator, target)


@torch.no_grad()
def largest_change(update: Update) -> float:
    """A bound for the absolute value of every entry of `scale * update`, from norms of its factors."""
    in_features, out_features = update.factors.features
    grid, shape = update.factors.grid, (out_features, in_features)
    blocks = product(_cut(0, out_features, out_features // grid), _cut(0, in_features, in_features // grid))
    largest = 0.0
    for rows, columns in blocks:
        pairs = update.factors.products(slice(*rows), slice(*columns), shape)
        largest = max(largest, sum((float(left.norm()) * float(right.norm()) for left, right in pairs), 0.0))
    return abs(update.scale) * largest


def _add_products(
    block: Tensor, terms: Sequence[tuple[Tensor, Tensor, float]], accumulator: torch.dtype, into: Tensor
) -> None:
    """`into = block + sum of scale * left @ right`, added up in the accumulator's dtype and rounded once."""
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


@torch.no_grad()
def delta_weight(update: Update, *, transposed: bool = False) -> Tensor:
    """The update as a dense matrix, `[out, in]`, or `[in, out]` if `transposed`."""
    in_features, out_features = update.factors.features
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    tensor = first_tensor(update.factors)
    zero = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return fold(zero, [update], transposed=transposed, out=zero)
