"""Quantized matrices as they are stored, in blocks or columns, and the values that they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_IN_CACHE = 2**17  # values dequantized at once


class BlockArrays(NamedTuple):
    """A block-quantized matrix."""

    packed: NDArray[np.uint8]  # `[N, K/block, block * bits / 8]`, uint8
    scales: NDArray[Any]  # `[N, K/block]`
    # `[N, ceil(K/block * bits / 8)]`, uint8; None if all are the middle of the integers' range
    zero_points: NDArray[np.uint8] | None


def dequantize_blocks(blocks: BlockArrays, bits: int, inputs: int) -> NDArray[np.float32]:
    """Return the dequantized values of blocks, `[N, K]`."""
    count, width = blocks.packed.shape[1:]
    values = np.empty((len(blocks.packed), count, width * 8 // bits), np.float32)
    zeros, scales = zeros_of(blocks, bits), blocks.scales[..., None]
    step = max(1, _IN_CACHE * len(values) // max(1, values.size))
    for first in range(0, len(values), step):
        part = slice(first, first + step)
        _unpack(blocks.packed[part], bits, values[part])
        values[part] -= zeros[part]
        values[part] *= scales[part]
    rows: NDArray[np.float32] = values.reshape(len(values), -1)[:, :inputs]
    return rows


def digest_of_blocks(parts: Iterable[NDArray[Any]]) -> str:
    """Return the SHA-256 of a matrix's integers, scales and zero points as they are stored."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def zeros_of(blocks: BlockArrays, bits: int) -> NDArray[np.float32]:
    """Return the zero points `[N, blocks, 1]`."""
    if blocks.zero_points is None:
        return np.full((*blocks.scales.shape, 1), 2.0 ** (bits - 1), np.float32)
    return _integers(blocks.zero_points, bits)[:, : blocks.packed.shape[1], None]


def _integers(stored: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Return the integers in bytes along the last axis."""
    values = np.empty((*stored.shape[:-1], stored.shape[-1] * 8 // bits), np.float32)
    _unpack(stored, bits, values)
    return values


def _unpack(stored: NDArray[np.uint8], bits: int, values: NDArray[np.float32]) -> None:
    """Write the integers in bytes along the last axis; with 4 bits, the first of two is the low nibble."""
    if bits == 4:
        values[..., ::2] = stored & 15
        values[..., 1::2] = stored >> 4
    else:
        values[...] = stored


def dequantize_columns(
    integers: NDArray[np.int8], scales: NDArray[np.float32], factors: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return the values `[K, N]` of integers `[K, N]`, scales `[N]` and factors `[K]`."""
    values: NDArray[np.float32] = integers * scales
    return values if factors is None else values * factors[:, None]
