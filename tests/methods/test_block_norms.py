"""Block norms from factors are those of the dense update's blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gralora_fx.core.methods.forms import block_norms, delta_weight
from gralora_fx.core.methods.gralora import Factors, GraloraSizes, initial_factors
from gralora_fx.core.methods.method import Update


def factors_of(rank: GraloraSizes, seed: int = 0) -> Factors:
    torch.manual_seed(seed)
    drawn = initial_factors(24, 48, rank, zero_update=False)
    return Factors(*(None if tensor is None else tensor.double() for tensor in drawn))  # type: ignore[arg-type]


def dense_norms(factors: Factors, scale: float, *, transposed: bool = False) -> Tensor:
    k = factors.sizes.k
    delta = delta_weight(Update(factors, scale), transposed=transposed)
    delta = delta.t() if transposed else delta
    return delta.view(k, 48 // k, k, 24 // k).transpose(1, 2).flatten(2).norm(dim=2)


@pytest.mark.parametrize(
    "rank",
    [
        GraloraSizes(8, 1),
        GraloraSizes(8, 2),
        GraloraSizes(8, 4, 3),
        GraloraSizes(8, 8, 2),
        GraloraSizes(12, 3, 5),
        GraloraSizes(4, 1, 2),
    ],
)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_norms_are_those_of_the_dense_blocks(rank: GraloraSizes, transposed: bool) -> None:
    factors = factors_of(rank)
    norms = block_norms(factors, -1.7)
    assert norms.shape == (rank.k, rank.k)
    torch.testing.assert_close(norms, dense_norms(factors, 1.7, transposed=transposed), rtol=1e-12, atol=0)


def test_rows_are_output_blocks() -> None:
    factors = factors_of(GraloraSizes(8, 4))
    factors.B[1] = 0
    is_zero = block_norms(factors, 1.0) == 0
    assert is_zero[1].all()
    assert not is_zero[[0, 2, 3]].any()


def test_a_fresh_update_is_zero_exactly() -> None:
    factors = initial_factors(24, 48, GraloraSizes(8, 4, 2))
    assert not block_norms(factors, 3.0).any()


def test_parts_that_cancel_leave_nothing_but_rounding() -> None:
    factors = factors_of(GraloraSizes(8, 1, 8))
    opposite = Factors(factors.A, factors.B, factors.A[0].t().clone(), -factors.B[0].t().clone())
    norm = block_norms(opposite, 1.0).item()
    assert 0 <= norm < 1e-6 * factors.B.norm().item()


def test_half_precision_factors_lose_nothing_more() -> None:
    half = Factors(*(None if t is None else t.bfloat16() for t in factors_of(GraloraSizes(8, 2, 2))))  # type: ignore[arg-type]
    exact = Factors(*(None if t is None else t.double() for t in half))  # type: ignore[arg-type]
    torch.testing.assert_close(block_norms(half, 1.0), dense_norms(exact, 1.0), rtol=1e-12, atol=0)
