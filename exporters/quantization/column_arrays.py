"""The arithmetic of columns: a matrix as int8 integers with a scale for each column."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ExportError

# Largest absolute value of a weight. x86 processors without VNNI add two products of uint8 and int8 in 16 bits, where
# 2 * 255 * 127 does not fit: they are refused when a session is opened (see `runtime.integer_sums`).
LARGEST = 127
ROW_LARGEST = 127  # integers of a row's largest value, less the zero point
ROW_TINY = 1e-30  # what a row of zeros is divided by
_ZERO, _SILENT = 1e-6, 1e-2  # mean square of a channel: of the mean of all; of the median of those that are not zero


def input_factors(squares: NDArray[np.float32], exponent: float) -> NDArray[np.float32]:
    """Factors `[K]` of what a product reads, which bring its channels nearer to each other; 1 for the median channel.

    A row is rounded by its largest value, so that channels with small values lose most. The weights take the factors
    back, and their columns are rounded too: as in SmoothQuant (arXiv:2211.10438) an exponent says which part of the
    differences is taken from the rows and left to the columns. Channels that were all but silent may be loud in other
    inputs, which a large factor would make the largest of their row: they have 1.

    Args:
        squares: Mean squares of the channels, `[K]`.
        exponent: 0 for factors of 1, 1 for what makes all channels equal.
    """
    least = _ZERO * max(float(squares.mean()), 1e-24)
    heard = squares[squares > least].astype(np.float64)
    median = float(np.median(heard)) if len(heard) else least
    factors = (np.maximum(squares.astype(np.float64), least) / median) ** (-exponent / 2)
    result: NDArray[np.float32] = np.where(squares < _SILENT * median, 1.0, factors).astype(np.float32)
    return result


def quantize_columns(
    matrix: NDArray[Any], name: str, factors: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix as integers between -127 and 127 with a scale a column, symmetric.

    Args:
        matrix: `[K, N]`.
        name: Its name in error messages.
        factors: Those of what is multiplied by it, `[K]`, which it takes back; None where there are none.

    Returns:
        Integers `[K, N]` and scales `[N]`; their product, times the factors, is close to the matrix.

    Raises:
        ExportError: A value is not finite.
    """
    matrix = matrix.astype(np.float32, copy=False)
    matrix = matrix if factors is None else matrix / factors[:, None]
    largest = np.abs(matrix).max(axis=0)
    if not np.isfinite(largest).all():
        raise ExportError(f"{name} holds values that are not finite, which int8 cannot express; mend the weights")
    scales = (largest / LARGEST).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    return np.clip((matrix / scales).round(), -LARGEST, LARGEST).astype(np.int8), scales


def dequantize_columns(
    integers: NDArray[np.int8], scales: NDArray[np.float32], factors: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The values `[K, N]` of integers `[K, N]`, scales `[N]` and factors `[K]`."""
    values: NDArray[np.float32] = integers * scales
    return values if factors is None else values * factors[:, None]
