"""The arithmetic of blocks: a matrix as small integers with scales and zero points, by ONNX Runtime's quantizer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ExportError
from gralora_fx.exporters.quantize.block_search import (
    BlockArrays,
    InputProducts,
    packed,
    scale_dtype,
    searched_blocks,
)
from gralora_fx.exporters.quantize.formats import Blocks


def quantize_blocks(
    matrix: NDArray[Any],
    form: Blocks,
    inputs: InputProducts | None = None,
    name: str = "a matrix",
) -> BlockArrays:
    """A matrix as blocks.

    Args:
        matrix: `[K, N]`, float32 or float16.
        form: How to quantize it.
        inputs: What is known of the inputs, for a search (see `searched_blocks`); None for nothing.
        name: Its name in error messages.
    """
    if not np.isfinite(matrix).all():
        raise ExportError(
            f"{name} holds values that are not finite, which int{form.bits} cannot express; mend the weights"
        )
    if form.rounding == "searched":
        return searched_blocks(matrix, form, inputs)
    integers, scales, zero_points = _quantizer(form.bits, form.block_size, form.zero_points)(matrix)
    blocks = BlockArrays(integers, scales, zero_points if form.zero_points else None)
    if scale_dtype(form, matrix.dtype) == matrix.dtype:
        return blocks
    return _on_grid(_in_blocks(matrix, form), blocks._replace(scales=_rounded_up(scales)), form)


def dequantize_blocks(blocks: BlockArrays, bits: int, inputs: int) -> NDArray[np.float32]:
    """The values of blocks, `[N, K]`."""
    values = (_integers(blocks.packed, bits) - _zeros_of(blocks, bits)) * blocks.scales[..., None]
    rows: NDArray[np.float32] = values.reshape(len(values), -1)[:, :inputs]
    return rows


def with_scales(matrix: NDArray[Any], blocks: BlockArrays, earlier: BlockArrays, form: Blocks) -> BlockArrays:
    """Blocks of a matrix, those whose scale and zero point were better before with these.

    Args:
        matrix: `[K, N]`.
        blocks: Its blocks.
        earlier: Blocks of the same shapes, scales in float32.
        form: How both are stored.
    """
    count, values = blocks.packed.shape[1], _in_blocks(matrix, form)
    kept, zeros = _on_grid(values, earlier, form), _zeros_of(earlier, form.bits)
    fresh = blocks._replace(scales=blocks.scales.astype(np.float32))
    both = [dequantize_blocks(of, form.bits, count * form.block_size) for of in (kept, fresh)]
    errors = [np.square(of.reshape(values.shape) - values).sum(-1) for of in both]
    is_kept = errors[0] <= errors[1]
    zero_points = None
    if blocks.zero_points is not None:
        new = np.where(is_kept[..., None], zeros, _zeros_of(blocks, form.bits))[..., 0].astype(np.uint8)
        zero_points = packed(np.pad(new, ((0, 0), (0, -count % (8 // form.bits)))), form.bits)
    return BlockArrays(
        np.where(is_kept[..., None], kept.packed, blocks.packed),
        np.where(is_kept, kept.scales, blocks.scales).astype(blocks.scales.dtype),
        zero_points,
    )


def _on_grid(values: NDArray[np.float32], grid: BlockArrays, form: Blocks) -> BlockArrays:
    """Blocks of values `[N, K/block, block]` with the scales and zero points of others."""
    scales = np.where(grid.scales == 0, 1, grid.scales)[..., None]
    integers = values / scales + _zeros_of(grid, form.bits)
    whole = integers.round().clip(0, 2**form.bits - 1).astype(np.uint8)
    return grid._replace(packed=packed(whole, form.bits))


def _in_blocks(matrix: NDArray[Any], form: Blocks) -> NDArray[np.float32]:
    """The values of a matrix `[K, N]` as `[N, K/block, block]`, the last block padded with zeros."""
    count = -(-len(matrix) // form.block_size)
    rows = np.zeros((matrix.shape[1], count * form.block_size), np.float32)
    rows[:, : len(matrix)] = matrix.T
    return rows.reshape(len(rows), count, form.block_size)


def _rounded_up(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next scales that bfloat16 holds, away from zero, so that no value of a block lies beyond its integers."""
    return ((scales.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def _zeros_of(blocks: BlockArrays, bits: int) -> NDArray[np.float32]:
    """The zero points `[N, blocks, 1]`."""
    if blocks.zero_points is None:
        return np.full((*blocks.scales.shape, 1), 2.0 ** (bits - 1), np.float32)
    return _integers(blocks.zero_points, bits)[:, : blocks.packed.shape[1], None]


@functools.cache
def _quantizer(
    bits: int, block_size: int, zero_points: bool
) -> Callable[[NDArray[Any]], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """ONNX Runtime's quantization of one matrix `[K, N]` to packed integers, scales and zero points."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizers  # it sets up logging when it is imported

    root.handlers, root.level = handlers, level
    config = quantizers.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=not zero_points, bits=bits)
    quantize: Callable[..., Any] = quantizers.DefaultWeightOnlyQuantizer(config).qbits_block_quant
    return quantize


def _integers(stored: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """The integers of bytes along the last axis; of two in a byte the first is the low nibble."""
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)
    return stored.astype(np.float32)
