"""The integers of a quantized checkpoint's weight, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class StoredIntegers:
    """A weight `[out, in]` as `scale * (code - zero)`, with a scale and a zero point for each group of inputs.

    Attributes:
        bits: Bits of a code.
        codes: Reads the codes `[out, in]`, uint8.
        scales: The scales `[out, groups]` in their stored dtype, to which values are rounded.
        zeros: The zero points `[out, groups]`, int16.
        groups: The group of each input, `[in]`.
    """

    bits: int
    codes: Callable[[], NDArray[np.uint8]]
    scales: NDArray[Any]
    zeros: NDArray[np.int16]
    groups: NDArray[np.int64]

    def values(self) -> NDArray[np.float32]:
        """Return the weight in float32."""
        return dequantized(self.codes(), self.scales, self.zeros, self.groups)


def dequantized(
    codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any] | int, groups: NDArray[Any]
) -> NDArray[np.float32]:
    """Return `scale * (code - zero)` in float32, rounded to the dtype of the scales; arguments are as above."""
    values = codes.astype(np.float32)
    values -= zeros[:, groups] if isinstance(zeros, np.ndarray) else np.float32(zeros)
    values *= scales.astype(np.float32)[:, groups]
    return values.astype(scales.dtype).astype(np.float32)


def equal_groups(inputs: int, count: int) -> NDArray[np.int64]:
    """Return the group of each input, `[inputs]`, for groups of equal size, one after the other."""
    return np.arange(inputs) // -(-inputs // count)
