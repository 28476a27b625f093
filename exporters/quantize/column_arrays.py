"""The arithmetic of columns: a matrix as int8 integers with a scale for each column."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ExportError

# Largest absolute value of a weight. x86 processors without VNNI add two products of uint8 and int8 in 16 bits, where
# 2 * 255 * 127 does not fit: they are refused when a session is opened (see `runtime.integer_sums`).
LARGEST = 127
ROW_LARGEST = 127  # integers of a row's largest value, less the zero point
ROW_TINY = 1e-30  # what a row of zeros is divided by
_TOGETHER = 32  # rows of a matrix that are rounded between two updates of the errors so far
_ZERO, _SILENT = 1e-6, 1e-2  # mean square of a channel: of the mean of all; of the median of those that are not zero


@dataclass(frozen=True, eq=False)
class ColumnInputs:
    """What is known of the rows that a matrix is multiplied by; what follows of it is computed once for all columns.

    Attributes:
        factors: What their channels are multiplied by before they are rounded, `[K]` (see `input_factors`); None for
            nothing.
        directions: `[K, r]`, those of most length: `directions @ directions.T` is that part of their second moments.
        rest: Mean squares of the channels beside it, `[K]`.
    """

    factors: NDArray[np.float32] | None
    directions: NDArray[np.float32]
    rest: NDArray[np.float32]

    @cached_property
    def scaled(self) -> NDArray[np.float32]:
        """The directions of rows that are multiplied by the factors, `[K, r]`."""
        return self.directions if self.factors is None else self.directions * self.factors[:, None]

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """How much an error along each direction changes each number, `[K, r]` (see `_made_up_for`).

        It is `(I + sum p_j p_j' / v_j)^-1 p_j / v_j`. The sum is of the number and those after it, so from the last on
        each adds a term to a matrix whose inverse is known (Sherman-Morrison).
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
    matrix: NDArray[Any], name: str, factors: NDArray[np.float32] | None = None, inputs: ColumnInputs | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix as integers between -127 and 127 with a scale a column, symmetric.

    Args:
        matrix: `[K, N]`.
        name: Its name in error messages.
        factors: Those of what is multiplied by it, `[K]`, which it takes back; None where there are none.
        inputs: What is known of what is multiplied by it, with the same factors, by which one integer makes up for the
            errors of others; None for the nearest integers.

    Returns:
        Integers `[K, N]` and scales `[N]`; their product, times the factors, is close to the matrix.
    """
    matrix = matrix.astype(np.float32, copy=False)
    matrix = matrix if factors is None else matrix / factors[:, None]
    largest = np.abs(matrix).max(axis=0)
    if not np.isfinite(largest).all():
        raise ExportError(f"{name} holds values that are not finite, which int8 cannot express; mend the weights")
    scales = (largest / LARGEST).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    steps = matrix / scales
    rounded = steps.round() if inputs is None else _made_up_for(steps, inputs)
    return np.clip(rounded, -LARGEST, LARGEST).astype(np.int8), scales


def _made_up_for(steps: NDArray[np.float32], inputs: ColumnInputs) -> NDArray[np.float32]:
    """Integers on either side of numbers `[K, N]`, for which the errors of products with known inputs are least.

    With the errors `e` so far along the directions `P`, the change of the numbers that follow that costs least is
    `-(p_j / v_j) (I + sum p_j p_j' / v_j)^-1 e`: `v` is what is left beside `P`. That is GPTQ (arXiv:2210.17323) with
    second moments of low rank.
    """
    directions, gains = inputs.scaled, inputs.gains
    rounded, left = np.floor(steps), np.empty_like(steps)
    errors = np.zeros((directions.shape[1], steps.shape[1]), np.float32)
    for begin in range(0, len(steps), _TOGETHER):  # the errors before it are one product for all numbers of a part
        part = slice(begin, begin + _TOGETHER)
        change, among = gains[part] @ errors, gains[part] @ directions[part].T
        for place, index in enumerate(range(*part.indices(len(steps)))):
            wanted = steps[index] - change[place] - among[place, :place] @ left[begin:index]
            rounded[index] += wanted - rounded[index] >= 0.5
            np.clip(rounded[index], -LARGEST, LARGEST, out=rounded[index])
            left[index] = rounded[index] - steps[index]
        errors += directions[part].T @ left[part]
    return rounded


def dequantize_columns(
    integers: NDArray[np.int8], scales: NDArray[np.float32], factors: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The values `[K, N]` of integers `[K, N]`, scales `[N]` and factors `[K]`."""
    values: NDArray[np.float32] = integers * scales
    return values if factors is None else values * factors[:, None]
