"""Other forms of a weight update: plain LoRA, and several updates as one."""

from __future__ import annotations

import pytest
import torch
from test_gralora import IN, OUT, RANKS, factors_of

from gralora_fx.core.methods.forms import delta_weight, summed, with_blocks
from gralora_fx.core.methods.gralora import Factors, GraloraSizes
from gralora_fx.core.methods.method import Update


def doubles(rank: GraloraSizes, seed: int = 0) -> Factors:
    return Factors(*(None if t is None else t.double() for t in factors_of(rank, seed)))


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_the_plain_lora_form_is_exact(rank: GraloraSizes) -> None:
    factors = doubles(rank)
    A, B = factors.lora_form()
    assert tuple(A.shape) == (rank.k * rank.r + rank.hybrid_r, IN)
    assert tuple(B.shape) == (OUT, rank.k * rank.r + rank.hybrid_r)
    assert torch.allclose(B @ A, delta_weight(Update(factors, 1.0)), atol=1e-14)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([GraloraSizes(8, 4)], GraloraSizes(8, 4)),
        ([GraloraSizes(8, 4), GraloraSizes(4, 4)], GraloraSizes(12, 4)),
        ([GraloraSizes(4, 2, 3), GraloraSizes(6, 2), GraloraSizes(2, 2, 1)], GraloraSizes(12, 2, 4)),
        ([GraloraSizes(4, 1), GraloraSizes(8, 4)], GraloraSizes(36, 1)),
        ([GraloraSizes(12, 3, 5), GraloraSizes(4, 2)], GraloraSizes(44, 1, 5)),
    ],
    ids=str,
)
def test_a_sum_of_updates_is_one_update(ranks: list[GraloraSizes], expected: GraloraSizes) -> None:
    updates = [Update(doubles(rank, seed), 0.5 - seed) for seed, rank in enumerate(ranks)]
    result = summed(updates)
    assert result.sizes == expected
    dense = sum(delta_weight(update) for update in updates)
    assert isinstance(dense, torch.Tensor)
    assert torch.allclose(delta_weight(Update(result, 1.0)), dense, atol=1e-13)


@pytest.mark.parametrize("rank", [GraloraSizes(*dims) for dims in ((4, 1), (4, 2), (6, 3, 2), (6, 6))], ids=str)
@pytest.mark.parametrize("k", [1, 6])
def test_the_blocks_of_another_k_are_exact(rank: GraloraSizes, k: int) -> None:
    factors = doubles(rank)
    A, B = with_blocks(factors, k)
    expected = rank.r * rank.k if k == 1 else rank.r * k // rank.k
    assert (A.shape, B.shape) == ((k, IN // k, expected), (k, expected, OUT // k))
    without = Update(Factors(factors.A, factors.B), 1.0)
    assert torch.allclose(delta_weight(Update(Factors(A, B), 1.0)), delta_weight(without), atol=1e-13)


def test_missing_ranks_are_zero() -> None:
    update = Update(doubles(GraloraSizes(4, 2)), 0.5)
    result = summed([update], r=8, k=2)
    assert result.sizes == GraloraSizes(8, 2)
    assert torch.allclose(delta_weight(Update(result, 1.0)), delta_weight(update), atol=1e-14)


def test_missing_rows_of_the_plain_part_are_zero() -> None:
    update = Update(doubles(GraloraSizes(4, 2)), 0.5)
    result = summed([update], hybrid_r=3)
    assert result.sizes == GraloraSizes(4, 2, 3)
    assert torch.equal(delta_weight(Update(result, 1.0)), delta_weight(update))


def test_sums_are_float32_or_better() -> None:
    half = Factors(*(None if t is None else t.bfloat16() for t in factors_of(GraloraSizes(4, 2))))
    assert summed([Update(half, 1.0)]).A.dtype == torch.float32
    assert summed([Update(half, 1.0), Update(doubles(GraloraSizes(4, 2)), 1.0)]).B.dtype == torch.float64
    assert tuple(summed([Update(half, 1.0)]).B.shape) == (2, 4, OUT // 2)
    assert tuple(summed([Update(half, 1.0)]).A.shape) == (2, IN // 2, 4)
