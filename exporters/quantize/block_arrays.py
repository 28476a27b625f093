"""Quantized matrices as they are stored, in blocks or columns, and the values that they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class BlockArrays(NamedTuple):
    """A block-quantized matrix."""

    packed: NDArray[np.uint8]  # `[N, K/block, block * bits / 8]`, uint8
    scales: NDArray[Any]  # `[N, K/block]`
    # `[N, ceil(K/block * bits / 8)]`, uint8; None if all are the middle of the integers' range
    zero_points: NDArray[np.uint8] | None


def dequantize_blocks(blocks: BlockArrays, bits: int, inputs: int) -> NDArray[np.float32]:
    """Return the dequantized values of blocks, `[N, K]`."""
    values = (_integers(blocks.packed, bits) - zeros_of(blocks, bits)) * blocks.scales[..., None]
    rows: NDArray[np.float32] = values.reshape(len(values), -1)[:, :inputs]
    return rows


def zeros_of(blocks: BlockArrays, bits: int) -> NDArray[np.float32]:
    """Return the zero points `[N, blocks, 1]`."""
    if blocks.zero_points is None:
        return np.full((*blocks.scales.shape, 1), 2.0 ** (bits - 1), np.float32)
    return _integers(blocks.zero_points, bits)[:, : blocks.packed.shape[1], None]


def _integers(stored: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Unpack bytes along the last axis to integers; with 4 bits, the first of two is the low nibble."""
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)
    return stored.astype(np.float32)


def dequantize_columns(
    integers: NDArray[np.int8], scales: NDArray[np.float32], factors: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return the values `[K, N]` of integers `[K, N]`, scales `[N]` and factors `[K]`."""
    values: NDArray[np.float32] = integers * scales
    return values if factors is None else values * factors[:, None]
