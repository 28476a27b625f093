"""The arithmetic of columns: a matrix as int8 integers with a scale for each column."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ExportError

# Largest absolute value of a weight: 7 bits, `reduce_range` of onnxruntime's quantizer. x86 processors without VNNI
# add two products of uint8 and int8 in int16, which saturates at 32,767: 2 * 255 * 64 = 32,640 fits, 2 * 255 * 127 not.
LARGEST = 64


def quantize_columns(matrix: NDArray[Any], name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix as integers between -64 and 64 with a scale a column, symmetric, as onnxruntime's quantizer rounds.

    Args:
        matrix: `[K, N]`.
        name: Its name in error messages.

    Returns:
        Integers `[K, N]` and scales `[N]`; their product is close to the matrix.

    Raises:
        ExportError: A value is not finite.
    """
    matrix = matrix.astype(np.float32, copy=False)
    largest = np.abs(matrix).max(axis=0).astype(np.float64)
    if not np.isfinite(largest).all():
        raise ExportError(f"{name} holds values that are not finite, which int8 cannot express; mend the weights")
    scales = (2 * largest / (2 * LARGEST)).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    return np.clip((matrix / scales).round(), -128, 127).astype(np.int8), scales


def rounded_to_columns(matrix: NDArray[Any], name: str) -> NDArray[np.float32]:
    """A matrix `[K, N]` quantized and dequantized again.

    Raises:
        ExportError: A value is not finite.
    """
    values, scales = quantize_columns(matrix, name)
    return values * scales
