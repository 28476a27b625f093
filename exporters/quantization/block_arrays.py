"""The arithmetic of blocks: a matrix as small integers with scales and zero points, by ONNX Runtime's quantizer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gralora_fx.exporters.quantization.formats import Blocks


class BlockArrays(NamedTuple):
    """The values of a quantized matrix.

    Attributes:
        packed: `[N, K/block, block * bits / 8]`, uint8.
        scales: `[N, K/block]`.
        zero_points: `[N, ceil(K/block * bits / 8)]`, uint8; None where all are half of the integers' range.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None


def quantize_blocks(matrix: NDArray[Any], form: Blocks) -> BlockArrays:
    """A matrix as blocks.

    Args:
        matrix: `[K, N]`, float32 or float16.
        form: How to quantize it.

    Returns:
        The blocks, scales in the matrix's dtype.
    """
    packed, scales, zero_points = _quantizer(form.bits, form.block_size, form.zero_points)(matrix)
    return BlockArrays(packed, scales, zero_points if form.zero_points else None)


def dequantize_blocks(blocks: BlockArrays, bits: int, inputs: int) -> NDArray[np.float32]:
    """The values of blocks, `[N, K]`.

    Args:
        blocks: The blocks, scales in float32.
        bits: Bits of a value.
        inputs: K.
    """
    packed, scales, zero_points = blocks
    zeros: Any = 2.0 ** (bits - 1)
    if zero_points is not None:
        zeros = _integers(zero_points, bits)[:, : packed.shape[1], None]
    values = (_integers(packed, bits) - zeros) * scales[..., None]
    rows: NDArray[np.float32] = values.reshape(len(packed), -1)[:, :inputs]
    return rows


def rounded_to_blocks(matrix: NDArray[Any], form: Blocks, dtype: torch.dtype) -> NDArray[np.float32]:
    """A matrix quantized and dequantized again.

    Args:
        matrix: `[K, N]`, float32 or float16.
        form: How it is quantized.
        dtype: Dtype of the scales.
    """
    blocks = quantize_blocks(matrix, form)
    scales = torch.from_numpy(blocks.scales).to(dtype).float().numpy()
    rows = dequantize_blocks(blocks._replace(scales=scales), form.bits, matrix.shape[0])
    return np.ascontiguousarray(rows.T)


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


def _integers(packed: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """The integers of bytes along the last axis; of two in a byte the first is the low nibble."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return packed.astype(np.float32)
