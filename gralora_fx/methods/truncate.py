"""The best approximation of a weight update by one of less rank, without the dense update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truncated(NamedTuple):
    """A truncated update.

    Attributes:
        A: `[rank, in]`, float32.
        B: `[out, rank]`, float32; `B @ A` is the approximation.
        lost: Frobenius norm of what was cut off.
        norm: Frobenius norm of the whole update.
    """

    A: Tensor
    B: Tensor
    lost: float
    norm: float


@torch.no_grad()
def truncate(A: Tensor, B: Tensor, scale: float, rank: int) -> Truncated:
    """The update of `rank` nearest to `scale * B @ A` in the Frobenius norm, by its singular values.

    With `B = Q R` and `A.T = P S` the singular values of `B @ A` are those of the small `R @ S.T` (Eckart and Young,
    1936, for why cutting them off is best). Everything is computed in float64.

    Args:
        A: `[R, in]`.
        B: `[out, R]`.
        scale: Factor of the update.
        rank: Rank of the result; less where the update's own rank cannot be that large.
    """
    Q, left = torch.linalg.qr(B.to(torch.float64) * scale)
    P, right = torch.linalg.qr(A.to(torch.float64).t())
    U, values, Vh = torch.linalg.svd(left @ right.t())
    rank = min(rank, values.shape[0])
    roots = values[:rank].sqrt()  # shared between the factors, so that neither is much larger than the other
    U, Vh = U[:, :rank], Vh[:rank]
    lost, norm = torch.linalg.vector_norm(values[rank:]), torch.linalg.vector_norm(values)
    return Truncated(
        ((roots[:, None] * Vh) @ P.t()).to(torch.float32),
        (Q @ (U * roots)).to(torch.float32),
        lost.item(),
        norm.item(),
    )


@torch.no_grad()
def update_norm(A: Tensor, B: Tensor, scale: float) -> float:
    """Frobenius norm of `scale * B @ A`, in float64, without the dense update."""
    left, right = B.to(torch.float64), A.to(torch.float64)
    squared = ((left.t() @ left) * (right @ right.t())).sum().clamp(min=0)
    return abs(scale) * squared.sqrt().item()
