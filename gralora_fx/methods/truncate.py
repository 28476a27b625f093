"""The best approximation of a weight update by one of less rank, without the dense update."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gralora_fx.methods.arrays import Array, cast, to_numpy


class Truncated(NamedTuple):
    """A truncated update.

    Attributes:
        A: `[rank, in]`, float32.
        B: `[out, rank]`, float32; `B @ A` is the approximation.
        lost: Frobenius norm of what was cut off.
        norm: Frobenius norm of the whole update.
    """

    A: NDArray[np.float32]
    B: NDArray[np.float32]
    lost: float
    norm: float


def truncate(A: Array, B: Array, scale: float, rank: int) -> Truncated:
    """The update of `rank` nearest to `scale * B @ A` in the Frobenius norm, by its singular values.

    With `B = Q R` and `A.T = P S` the singular values of `B @ A` are those of the small `R @ S.T` (Eckart and Young,
    1936, for why cutting them off is best). Everything is computed in float64.

    Args:
        A: `[R, in]`.
        B: `[out, R]`.
        scale: Factor of the update.
        rank: Rank of the result; less where the update's own rank cannot be that large.
    """
    Q, left = np.linalg.qr(_float64(B) * scale)
    P, right = np.linalg.qr(_float64(A).T)
    U, values, Vh = np.linalg.svd(left @ right.T, full_matrices=False)
    rank = min(rank, values.shape[0])
    roots = np.sqrt(values[:rank])  # shared between the factors, so that neither is much larger than the other
    U, Vh = U[:, :rank], Vh[:rank]
    return Truncated(
        ((roots[:, None] * Vh) @ P.T).astype(np.float32),
        (Q @ (U * roots)).astype(np.float32),
        float(np.linalg.norm(values[rank:])),
        float(np.linalg.norm(values)),
    )


def update_norm(A: Array, B: Array, scale: float) -> float:
    """Frobenius norm of `scale * B @ A`, in float64, without the dense update."""
    left, right = _float64(B), _float64(A)
    squared = ((left.T @ left) * (right @ right.T)).sum()
    return abs(scale) * float(np.sqrt(max(squared, 0.0)))


def _float64(array: Array) -> NDArray[Any]:
    found: NDArray[Any] = cast(to_numpy(array), np.float64)
    return found
