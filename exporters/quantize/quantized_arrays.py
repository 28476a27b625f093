"""Arithmetic of quantized matrices, in blocks or columns.

Blocks are small integers with scales and zero points, by ONNX Runtime's quantizer; columns are int8 with one scale
each.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ExportError
from gralora_fx.exporters.formats import Blocks, InputOrder
from gralora_fx.exporters.quantize.block_arrays import BlockArrays, dequantize_blocks, zeros_of
from gralora_fx.exporters.quantize.block_search import InputProducts, packed, scale_dtype, searched_blocks

_IN_CACHE = 2**16  # values rounded at once
_EXACT = 0.15  # of a step: what a checkpoint's integers may differ by from its values, which may have 16 bits


def quantize_blocks(
    matrix: NDArray[Any], form: Blocks, inputs: InputProducts | None = None, name: str = "a matrix"
) -> BlockArrays:
    """Quantize a matrix `[K, N]`, float32 or float16, in blocks; a search uses the products of its inputs, if known."""
    if not np.isfinite(matrix).all():
        raise ExportError(
            f"{name} holds values that are not finite, which int{form.bits} cannot express; mend the weights"
        )
    if form.rounding == "searched":
        return searched_blocks(matrix, form, inputs)
    integers, scales, zero_points = _quantizer(form.bits, form.block_size, form.zero_points)(matrix)
    blocks = BlockArrays(integers, scales, zero_points if form.zero_points else None)
    stored = scale_dtype(form, matrix.dtype)
    if stored == matrix.dtype:
        return blocks
    return _on_grid(_in_blocks(matrix, form), blocks._replace(scales=_rounded_up(scales, stored)), form)


def are_nearest(rows: NDArray[np.float32], stored: NDArray[np.float32], scales: NDArray[Any], form: Blocks) -> bool:
    """Return whether dequantized values `[n, in]` are the nearest to others, and scales `[n, blocks]` their blocks'.

    Equal ones are too, whatever their scales.
    """
    steps, widened = np.abs(scales.astype(np.float32)), form.scale_bits == 16
    of_value = np.repeat(steps, form.block_size, axis=1)[:, : rows.shape[1]]
    gaps = np.abs(stored - rows)
    if (gaps <= _EXACT * of_value).all():
        return True
    blocks = np.pad(rows, ((0, 0), (0, -rows.shape[1] % form.block_size))).reshape(*steps.shape, form.block_size)
    own = np.abs(_scales_and_zeros(blocks, form)[0])
    # scales are rounded up before integers are made of them, or else to the nearest afterwards
    share, up = (1e-5, 2.0**-7) if widened else (1e-5 + float(np.spacing(scales.dtype.type(1))), 0.0)
    slack = 2.0**-24 if scales.dtype == np.float16 else 0.0  # its smallest steps
    reach = 0.505 + 2**form.bits * (share / 2)
    if not form.zero_points:  # the largest value of the other sign is as far as a step away
        reach = np.where(np.abs(rows) < (2 ** (form.bits - 1) - 1.5) * of_value, reach, reach + 0.5)
    is_own = (steps >= own * (1 - share) - slack) & (steps <= own * (1 + up + share) + slack)
    return bool(is_own.all() and (gaps <= reach * of_value + 2**form.bits * slack).all())


def nearest_errors(rows: NDArray[np.float32], form: Blocks) -> NDArray[np.float32]:
    """Return the squared error that rounding to nearest gives each row of a matrix `[n, in]`: `[n]`.

    It is that of `quantize_blocks` in a third of the time: rows are read where they are, a few at a time.
    """
    missing = -rows.shape[1] % form.block_size
    padded = np.pad(rows, ((0, 0), (0, missing))) if missing else rows
    blocks = padded.reshape(len(rows), -1, form.block_size)
    step = max(1, _IN_CACHE // padded.shape[1])
    parts = [_nearest_errors(blocks[first : first + step], form) for first in range(0, len(rows), step)]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _nearest_errors(blocks: NDArray[np.float32], form: Blocks) -> NDArray[np.float32]:
    scales, zeros = _scales_and_zeros(blocks, form)
    stored = scale_dtype(form, blocks.dtype)
    steps = (scales if stored == blocks.dtype else _rounded_up(scales, stored))[..., None]
    change = _integers(blocks, steps, zeros[..., None], form)
    change -= zeros[..., None]
    change *= steps
    change -= blocks
    errors: NDArray[np.float32] = np.einsum("ijk,ijk->i", change, change)
    return errors


def _scales_and_zeros(blocks: NDArray[np.float32], form: Blocks) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the scales and zero points that rounding to nearest gives blocks `[n, blocks, size]`: `[n, blocks]`."""
    largest, middle = 2**form.bits - 1, np.float32(2 ** (form.bits - 1))
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    if not form.zero_points:
        return np.where(-low > high, low, high) / -middle, np.full(low.shape, middle)
    scales = (high - low) / largest
    return scales, np.rint(-low / np.where(scales == 0, 1, scales)).clip(0, largest)


def order_of(order: InputOrder) -> NDArray[np.int64]:
    """Return an order of inputs as an array `[in]`."""
    return np.frombuffer(order.places, np.int64)


def in_usual_order(values: NDArray[np.float32], order: InputOrder | None) -> NDArray[np.float32]:
    """Return a matrix `[out, in]`, whose inputs are in an order of their own, in the usual one."""
    if order is None:
        return values
    result = np.empty_like(values)
    result[:, order_of(order)] = values
    return result


def with_scales(matrix: NDArray[Any], blocks: BlockArrays, earlier: BlockArrays, form: Blocks) -> BlockArrays:
    """Return a matrix's blocks with the scale and zero point of earlier ones where they fit better.

    The matrix is `[K, N]`; `earlier` has the shapes of `blocks`, and scales in float32.
    """
    count, values = blocks.packed.shape[1], _in_blocks(matrix, form)
    kept, zeros = _on_grid(values, earlier, form), zeros_of(earlier, form.bits)
    fresh = blocks._replace(scales=blocks.scales.astype(np.float32))
    both = [dequantize_blocks(of, form.bits, count * form.block_size) for of in (kept, fresh)]
    errors = [np.square(of.reshape(values.shape) - values).sum(-1) for of in both]
    is_kept = errors[0] <= errors[1]
    zero_points = None
    if blocks.zero_points is not None:
        new = np.where(is_kept[..., None], zeros, zeros_of(blocks, form.bits))[..., 0].astype(np.uint8)
        zero_points = packed(np.pad(new, ((0, 0), (0, -count % (8 // form.bits)))), form.bits)
    return BlockArrays(
        np.where(is_kept[..., None], kept.packed, blocks.packed),
        np.where(is_kept, kept.scales, blocks.scales).astype(blocks.scales.dtype),
        zero_points,
    )


def _on_grid(values: NDArray[np.float32], grid: BlockArrays, form: Blocks) -> BlockArrays:
    """Quantize values `[N, K/block, block]` with the given blocks' scales and zero points."""
    integers = _integers(values, grid.scales[..., None], zeros_of(grid, form.bits), form)
    return grid._replace(packed=packed(integers.astype(np.uint8), form.bits))


def _integers(values: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any], form: Blocks) -> NDArray[Any]:
    """Return the nearest integers, as floats, of values `[N, K/block, block]`; scales and zero points end in 1."""
    integers: NDArray[Any] = values / np.where(scales == 0, 1, scales)
    integers += zeros
    return np.clip(np.rint(integers, out=integers), 0, 2**form.bits - 1, out=integers)


def _in_blocks(matrix: NDArray[Any], form: Blocks) -> NDArray[np.float32]:
    """Return a matrix `[K, N]` as `[N, K/block, block]`, the last block padded with zeros."""
    count = -(-len(matrix) // form.block_size)
    rows = np.zeros((matrix.shape[1], count * form.block_size), np.float32)
    rows[:, : len(matrix)] = matrix.T
    return rows.reshape(len(rows), count, form.block_size)


def _rounded_up(scales: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """Round scales to 16 bits away from zero, so that no value of a block exceeds its integers' range."""
    if dtype == np.float16:
        near = scales.astype(np.float16)
        far = np.nextafter(near, np.copysign(np.float16(np.inf), near))
        return np.where(np.abs(near.astype(np.float32)) < np.abs(scales), far, near).astype(np.float32)
    return ((scales.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


@functools.cache
def _quantizer(
    bits: int, block_size: int, zero_points: bool
) -> Callable[[NDArray[Any]], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Return ONNX Runtime's quantizer of a matrix `[K, N]` to packed integers, scales and zero points."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizers  # it sets up logging when it is imported

    root.handlers, root.level = handlers, level
    config = quantizers.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=not zero_points, bits=bits)
    quantize: Callable[..., Any] = quantizers.DefaultWeightOnlyQuantizer(config).qbits_block_quant
    return quantize


# Largest absolute value of a weight. x86 processors without VNNI add two products of uint8 and int8 in 16 bits, where
# 2 * 255 * 127 does not fit: they are refused when a session is opened (see `check_integer_sums`).
LARGEST = 127
ROW_LARGEST = 127  # integers of a row's largest value, less the zero point
ROW_TINY = 1e-30  # divisor of a row of zeros
_TOGETHER = 32  # rows of a matrix that are rounded between two updates of the errors so far
_ZERO, _SILENT = 1e-6, 1e-2  # thresholds of a channel's mean square: of the mean; of the non-zero median


@dataclass(frozen=True, eq=False)
class ColumnInputs:
    """Statistics of the rows that a matrix is multiplied by; derived values are cached for all columns."""

    factors: NDArray[np.float32] | None  # `[K]`, of the channels before rounding (see `input_factors`)
    directions: NDArray[np.float32]  # `[K, r]`; `directions @ directions.T` is their part of the second moments
    rest: NDArray[np.float32]  # `[K]`, remaining mean squares of the channels

    @cached_property
    def scaled(self) -> NDArray[np.float32]:
        """Directions multiplied by the factors, `[K, r]`."""
        return self.directions if self.factors is None else self.directions * self.factors[:, None]

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """Effect of an error along each direction on each number, `[K, r]` (see `_made_up_for`).

        It is `(I + sum p_j p_j' / v_j)^-1 p_j / v_j`, the sum over the number and those after it: from the last on,
        each adds a rank-one term to a known inverse (Sherman-Morrison).
        """
        directions = self.scaled.astype(np.float64)
        rest = (self.rest if self.factors is None else self.rest * np.square(self.factors)).astype(np.float64)
        inverse, gains = np.eye(directions.shape[1]), np.empty_like(directions)
        for index in reversed(range(len(directions))):
            own = inverse @ directions[index]
            inverse -= np.outer(own, own) / (rest[index] + directions[index] @ own)
            gains[index] = inverse @ directions[index] / rest[index]
        return gains.astype(np.float32)


def input_factors(squares: NDArray[np.float32], exponent: float) -> NDArray[np.float32]:
    """Return factors `[K]` for a product's input channels that equalise them; 1 for the median channel.

    As in SmoothQuant (arXiv:2211.10438), weights are divided by them, and `exponent`, from 0 (factors of 1) to 1 (all
    channels equal), says how much of the differences of `squares` `[K]`, the channels' mean squares, moves from rows to
    columns. A nearly silent channel has 1: other inputs may make it loud, and so their row's largest.
    """
    least = _ZERO * max(float(squares.mean()), 1e-24)
    heard = squares[squares > least].astype(np.float64)
    median = float(np.median(heard)) if len(heard) else least
    factors = (np.maximum(squares.astype(np.float64), least) / median) ** (-exponent / 2)
    result: NDArray[np.float32] = np.where(squares < _SILENT * median, 1.0, factors).astype(np.float32)
    return result


def quantize_columns(
    matrix: NDArray[Any], name: str, factors: NDArray[np.float32] | None = None, inputs: ColumnInputs | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize a matrix `[K, N]` to int8 `[K, N]` between -127 and 127, with one scale per column `[N]`.

    `factors` `[K]`, by which the matrix is divided first, are those that `inputs` were scaled by. Errors are
    compensated for `inputs`; without them numbers are rounded to nearest. Integers times scales times factors
    approximate the matrix.
    """
    matrix = matrix.astype(np.float32, copy=False)
    matrix = matrix if factors is None else matrix / factors[:, None]
    scales = column_scales(matrix)
    if not np.isfinite(scales).all():
        raise ExportError(f"{name} holds values that are not finite, which int8 cannot express; mend the weights")
    steps: NDArray[Any] = matrix / scales
    rounded = steps.round() if inputs is None else _made_up_for(steps, inputs)
    return np.clip(rounded, -LARGEST, LARGEST).astype(np.int8), scales


def column_scales(matrix: NDArray[Any]) -> NDArray[np.float32]:
    """Return the scale of each column of a matrix `[K, N]`: `[N]`."""
    scales: NDArray[np.float32] = (np.abs(matrix).max(axis=0) / LARGEST).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    return scales


def _made_up_for(steps: NDArray[np.float32], inputs: ColumnInputs) -> NDArray[np.float32]:
    """Round numbers `[K, N]` up or down to minimise the error of products with known inputs.

    With errors `e` so far along the directions `P`, the cheapest change of the following numbers is `-(p_j / v_j) (I +
    sum p_j p_j' / v_j)^-1 e`, where `v` is the rest beside `P`: GPTQ (arXiv:2210.17323) with low-rank second moments.
    """
    directions, gains = inputs.scaled, inputs.gains
    rounded, left = np.floor(steps), np.empty_like(steps)
    errors = np.zeros((directions.shape[1], steps.shape[1]), np.float32)
    for begin in range(0, len(steps), _TOGETHER):  # one product adds all errors before a part
        part = slice(begin, begin + _TOGETHER)
        change, among = gains[part] @ errors, gains[part] @ directions[part].T
        for place, index in enumerate(range(*part.indices(len(steps)))):
            wanted = steps[index] - change[place] - among[place, :place] @ left[begin:index]
            rounded[index] += wanted - rounded[index] >= 0.5
            np.clip(rounded[index], -LARGEST, LARGEST, out=rounded[index])
            left[index] = rounded[index] - steps[index]
        errors += directions[part].T @ left[part]
    return rounded
