"""The mathematics of GraLoRA, compared with PEFT's layer."""

from __future__ import annotations

import itertools
import math

import peft
import pytest
import torch
from peft.tuners.gralora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gralora_fx.core.methods.fold import fold
from gralora_fx.core.methods.forms import delta_weight
from gralora_fx.core.methods.gralora import Factors, GraloraSizes, initial_factors
from gralora_fx.core.methods.lora import LoraFactors
from gralora_fx.core.methods.low_rank import accumulate, project
from gralora_fx.core.methods.method import LayerCall, Update
from gralora_fx.core.methods.registry import GRALORA

pytestmark = pytest.mark.quick

IN, OUT = 24, 48
RANKS = [
    GraloraSizes(4, 1),
    GraloraSizes(4, 2),
    GraloraSizes(8, 4),
    GraloraSizes(12, 3, 5),
    GraloraSizes(4, 4, 1),
    GraloraSizes(6, 2, 6),
]
SCALE = 0.75


def factors_of(rank: GraloraSizes, seed: int = 0, in_features: int = IN, out_features: int = OUT) -> Factors:
    torch.manual_seed(seed)
    return initial_factors(in_features, out_features, rank, zero_update=False)


def peft_layer(rank: GraloraSizes, seed: int = 0, conv1d: bool = False, init_weights: bool = False) -> PeftLinear:
    """PEFT's layer over a random base, with the draws that follow `seed`."""
    base = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT)
    nn.init.normal_(base.bias)
    torch.manual_seed(seed)
    config = peft.GraloraConfig(
        r=rank.r,
        gralora_k=rank.k,
        hybrid_r=rank.hybrid_r,
        alpha=SCALE * (rank.r + rank.hybrid_r),
        init_weights=init_weights,
        fan_in_fan_out=conv1d,
    )
    return PeftLinear(base, "default", module_name="fc", r=rank.r, config=config, fan_in_fan_out=conv1d)


def pefts_factors(layer: PeftLinear) -> Factors:
    general = (layer.gralora_A_general, layer.gralora_B_general)
    return Factors(
        layer.gralora_A["default"].detach(),
        layer.gralora_B["default"].detach(),
        *(part["default"].weight.detach() if isinstance(part["default"], nn.Linear) else None for part in general),
    )


@pytest.mark.parametrize("zero_update", [True, False])
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_initial_draws_are_pefts(rank: GraloraSizes, zero_update: bool) -> None:
    theirs = pefts_factors(peft_layer(rank, seed=3, init_weights=zero_update))
    torch.manual_seed(3)
    ours = initial_factors(IN, OUT, rank, zero_update=zero_update)
    for name, tensor in ours._asdict().items():
        peer = getattr(theirs, name)
        assert (tensor is None) == (peer is None), name
        assert tensor is None or torch.equal(tensor, peer), name
    assert bool(ours.B.any()) is not zero_update


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_shapes_and_counts(rank: GraloraSizes) -> None:
    factors = factors_of(rank)
    shapes = {name: tuple(t.shape) for name, t in factors._asdict().items() if t is not None}
    assert shapes == GRALORA.shapes(IN, OUT, rank)
    assert GRALORA.parameter_count(IN, OUT, rank) == sum(t.numel() for t in factors if t is not None)
    assert GRALORA.parameter_count(IN, OUT, rank) == (rank.r + rank.hybrid_r) * (IN + OUT)
    assert factors.sizes == rank
    assert all(t.is_contiguous() for t in factors if t is not None)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_the_update_is_pefts(rank: GraloraSizes, conv1d: bool) -> None:
    layer = peft_layer(rank, conv1d=conv1d)
    update = Update(pefts_factors(layer), SCALE)
    expected = layer.get_delta_weight("default").detach()
    actual = delta_weight(update, transposed=conv1d)
    assert actual.shape == expected.shape == layer.get_base_layer().weight.shape
    assert torch.allclose(actual, expected, atol=1e-6)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_the_forward_is_pefts(rank: GraloraSizes) -> None:
    layer = peft_layer(rank)
    x = torch.randn(2, 5, IN)
    with torch.no_grad():
        base = layer.get_base_layer()(x)
        expected = layer(x)
        actual = GRALORA.forward(LayerCall(x, base.clone(), (IN, OUT)), pefts_factors(layer), SCALE, sizes=rank)
    assert torch.allclose(actual, expected, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5), (2, 1, 3, 2), (0,), (2, 0, 4), (1,)], ids=str)
@pytest.mark.parametrize("rank", [GraloraSizes(8, 4), GraloraSizes(6, 2, 3)], ids=str)
def test_any_number_of_leading_axes(rank: GraloraSizes, shape: tuple[int, ...]) -> None:
    """PEFT takes two or three dimensions only; the dense update takes all."""
    factors = factors_of(rank)
    x = torch.randn(*shape, IN)
    y = torch.randn(*shape, OUT)
    expected = y + x @ delta_weight(Update(factors, SCALE)).T
    actual = GRALORA.forward(LayerCall(x, y.clone(), (IN, OUT)), factors, SCALE, sizes=rank)
    assert actual.shape == y.shape
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("rows", [(0, 16), (16, 48), (5, 6)], ids=str)
def test_a_part_of_the_layers_output(rank: GraloraSizes, rows: tuple[int, int]) -> None:
    """`nn.MultiheadAttention` computes keys and values from some rows of its weight."""
    factors, x, y = factors_of(rank), torch.randn(2, 5, IN), torch.randn(2, 5, OUT)
    whole = GRALORA.forward(LayerCall(x, y.clone(), (IN, OUT)), factors, SCALE, sizes=rank)
    part = y[..., slice(*rows)].clone()
    actual = GRALORA.forward(LayerCall(x, part, (IN, OUT), rows=rows), factors, SCALE, sizes=rank)
    assert torch.allclose(actual, whole[..., slice(*rows)], atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_accumulating_writes_into_the_output_only_without_gradients(k: int) -> None:
    y, x = torch.randn(3, 4), torch.randn(3, 6)
    A, B = (torch.randn(2, 6), torch.randn(4, 2)) if k == 1 else (torch.randn(2, 3, 2), torch.randn(2, 2, 2))
    hidden, update = project(x, A), Update(LoraFactors(A, B) if k == 1 else Factors(A, B), 0.5)
    expected = y + x @ delta_weight(update).T
    assert torch.allclose(accumulate(y, hidden, B, 0.5, in_place=False), expected, atol=1e-6)
    B.requires_grad_()
    result = accumulate(y, hidden, B, 0.5)
    assert torch.allclose(result, expected, atol=1e-6)
    assert result.requires_grad
    assert not torch.allclose(y, expected)
    with torch.no_grad():
        assert accumulate(y, hidden, B, 0.5).data_ptr() == y.data_ptr()
    assert torch.allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_layer_gets_a_float32_adapter(dtype: torch.dtype) -> None:
    rank = GraloraSizes(6, 2, 3)
    factors = factors_of(rank)
    x, y = torch.randn(3, IN).to(dtype), torch.randn(3, OUT).to(dtype)
    adapter = x.float() @ delta_weight(Update(factors, 1.0)).T
    actual = GRALORA.add_output(LayerCall(x, y, (IN, OUT)), factors, SCALE, sizes=rank, dtype=torch.float32)
    assert actual.dtype == dtype
    expected = y.float() + SCALE * adapter
    assert torch.allclose(actual.float(), expected, atol=4 * torch.finfo(dtype).eps * float(expected.abs().max()))


def test_dropout_zeroes_inputs_and_rescales() -> None:
    rank = GraloraSizes(4, 2)
    factors = factors_of(rank)
    x, zero = torch.ones(20_000, IN), torch.zeros(20_000, OUT)
    dropped = GRALORA.forward(LayerCall(x, zero.clone(), (IN, OUT)), factors, 1.0, sizes=rank, dropout=0.4)
    plain = GRALORA.forward(LayerCall(x, zero.clone(), (IN, OUT)), factors, 1.0, sizes=rank)
    assert dropped.std(dim=0).min() > 0
    assert torch.allclose(dropped.mean(dim=0), plain[0], atol=0.05)


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_gradients_reach_every_factor(rank: GraloraSizes) -> None:
    leaves = [None if t is None else t.clone().requires_grad_() for t in factors_of(rank)]
    x = torch.randn(3, IN, requires_grad=True)
    weight = torch.randn(IN, OUT)
    GRALORA.forward(LayerCall(x, x @ weight, (IN, OUT)), Factors(*leaves), SCALE, sizes=rank).square().sum().backward()
    dense = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    # the same through the dense matrix
    A, B = Factors(*dense).lora_form()
    y = x.detach() @ weight + SCALE * (x.detach() @ A.T) @ B.T
    y.square().sum().backward()
    for ours, theirs in zip(leaves, dense, strict=True):
        if ours is not None and theirs is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    assert x.grad is not None


# -- folding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_folding_adds_the_update(rank: GraloraSizes, transposed: bool) -> None:
    weight = torch.randn(IN, OUT) if transposed else torch.randn(OUT, IN)
    before = weight.clone()
    update = Update(factors_of(rank), SCALE)
    folded = fold(weight, [update], transposed=transposed)
    assert torch.allclose(folded, weight + delta_weight(update, transposed=transposed), atol=1e-6)
    assert torch.equal(weight, before)
    assert folded.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", list(itertools.combinations(RANKS, 2)), ids=str)
def test_several_updates_of_different_k(ranks: tuple[GraloraSizes, GraloraSizes], transposed: bool) -> None:
    weight = torch.randn(IN, OUT) if transposed else torch.randn(OUT, IN)
    updates = [Update(factors_of(rank, seed), 0.5 + seed) for seed, rank in enumerate(ranks)]
    expected = weight + sum(delta_weight(update, transposed=transposed) for update in updates)
    assert torch.allclose(fold(weight, updates, transposed=transposed), expected, atol=1e-5)


def test_folding_in_place_and_into_a_buffer() -> None:
    weight, update = torch.randn(OUT, IN), Update(factors_of(GraloraSizes(8, 4, 2)), SCALE)
    expected = fold(weight, [update])
    buffer = torch.full_like(weight, float("nan"))
    assert fold(weight, [update], out=buffer) is buffer
    assert torch.equal(buffer, expected)
    assert fold(weight, [update], out=weight) is weight
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_float32_result(dtype: torch.dtype, transposed: bool) -> None:
    weight = (torch.randn(IN, OUT) if transposed else torch.randn(OUT, IN)).to(dtype)
    updates = [Update(factors_of(GraloraSizes(8, 4, 2)), SCALE), Update(factors_of(GraloraSizes(4, 2), 1), 2.0)]
    exact = fold(weight.float(), updates, transposed=transposed)
    folded = fold(weight, updates, transposed=transposed)
    assert folded.dtype == dtype
    assert torch.equal(folded, exact.to(dtype))


def test_float64_weights_are_folded_in_float64() -> None:
    weight, factors = torch.randn(OUT, IN, dtype=torch.float64), factors_of(GraloraSizes(8, 4, 2))
    doubles = Factors(*(None if t is None else t.double() for t in factors))
    expected = weight + SCALE * torch.linalg.multi_dot([*reversed(doubles.lora_form())])
    assert torch.allclose(fold(weight, [Update(factors, SCALE)]), expected, atol=1e-13)


# -- the update ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [GraloraSizes(4, 1), GraloraSizes(4, 2), GraloraSizes(8, 4)], ids=str)
def test_the_rank_of_the_update_is_k_times_r(rank: GraloraSizes) -> None:
    update = delta_weight(Update(factors_of(rank, in_features=64, out_features=64), 1.0))
    assert torch.linalg.matrix_rank(update) == rank.k * rank.r


def test_one_block_is_plain_lora() -> None:
    factors = factors_of(GraloraSizes(4, 1))
    assert torch.allclose(delta_weight(Update(factors, 2.0)), 2 * factors.B[0].T @ factors.A[0].T, atol=1e-6)


def test_the_formula_of_a_block() -> None:
    """dW[out block j, in block n] = scale * B[j][n*s:(n+1)*s].T @ A[n][:, j*s:(j+1)*s].T."""
    rank = GraloraSizes(8, 4)
    factors, s = factors_of(rank), 2
    update = delta_weight(Update(factors, SCALE))
    for j, n in itertools.product(range(4), range(4)):
        block: Tensor = update[j * 12 : (j + 1) * 12, n * 6 : (n + 1) * 6]
        expected = SCALE * factors.B[j][n * s : (n + 1) * s].T @ factors.A[n][:, j * s : (j + 1) * s].T
        assert torch.allclose(block, expected, atol=1e-6)


def test_initial_values_have_kaimings_bound() -> None:
    factors = initial_factors(400, 400, GraloraSizes(8, 4))
    assert factors.A.abs().max() <= 1 / math.sqrt(100)
    assert factors.A.abs().max() > 0.95 / math.sqrt(100)
