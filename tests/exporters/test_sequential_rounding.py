"""Weights rounded one after the other, for the inputs that the rounded ones before give."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gralora_fx import trace
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.quantize import block_search
from gralora_fx.exporters.quantize.block_arrays import dequantize_blocks
from gralora_fx.exporters.quantize.block_search import InputProducts
from gralora_fx.exporters.quantize.quantized_arrays import quantize_blocks
from gralora_fx.exporters.quantize.round_in_order import Moments, round_in_order

FORM = Blocks(4, rounding="searched")


class Twice(nn.Module):
    """A layer before another one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(96, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.again(torch.relu(self.again(y)))


def rounded(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return a layer's weight, rounded for inputs `[positions, in]`."""
    products = InputProducts((inputs.T @ inputs / len(inputs))[None])
    matrix = np.ascontiguousarray(layer.weight.detach().T.numpy())
    return torch.from_numpy(dequantize_blocks(quantize_blocks(matrix, FORM, products), 4, len(matrix)))


@pytest.mark.quick
def test_a_weight_is_rounded_for_what_the_rounded_ones_before_it_give() -> None:
    torch.manual_seed(0)
    module = Twice().eval()
    mixed = torch.randn(96, 96)
    cases = [torch.randn(40, 96) @ mixed, torch.randn(24, 96) @ mixed]  # of several lengths
    traced = trace(module, (cases[0],))
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    blocks = round_in_order(
        traced, [{"x": x} for x in cases], {name: (f"{name}.weight", FORM) for name in ("first", "again")}
    )
    values = {
        name: torch.from_numpy(dequantize_blocks(of, 4, 96 if name == "first" else 64)) for name, of in blocks.items()
    }
    with torch.no_grad():
        x = torch.cat(cases)
        first = rounded(module.first, x)
        y = torch.relu(nn.functional.linear(x, first, module.first.bias))
        again = rounded(module.again, torch.cat([y, torch.relu(module.again(y))]))
    assert torch.allclose(values["first"], first)
    assert float((~torch.isclose(values["again"], again)).float().mean()) < 0.01  # a sum's order decides some integers
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


class UnderAutocast(nn.Module):
    """Its last layer runs in another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.last(x).float()


def test_rounding_leaves_autocast_as_it_was() -> None:
    """Rounding ends at the last layer, before the end of its region."""
    x = torch.randn(4, 32)
    traced = trace(UnderAutocast().eval(), (x,))
    round_in_order(traced, [{"x": x}, {"x": x}], {name: (f"{name}.weight", FORM) for name in ("first", "last")})
    assert not torch.is_autocast_enabled("cpu")


def test_columns_that_are_rounded_in_threads_are_those_rounded_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the groups: no column's integers depend on the others, and the number of threads is as before."""
    torch.manual_seed(0)
    matrix, inputs = np.random.default_rng(0).standard_normal((160, 300), np.float32), torch.randn(500, 160)
    products = InputProducts((inputs.T @ inputs / len(inputs))[None])
    monkeypatch.setattr(block_search, "_FEWEST", 100)
    monkeypatch.setattr(block_search, "_TOGETHER", 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(quantize_blocks(matrix, FORM, products))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_the_products_of_a_layers_inputs_take_memory_from_its_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all layers are as large as the model."""
    alive: list[weakref.ref[Tensor]] = []
    most, add = 0, Moments.add

    def noted(moments: Moments, rows: Tensor) -> None:
        nonlocal most
        add(moments, rows)
        alive.append(weakref.ref(moments.windows))
        most = max(most, len({id(each()) for each in alive if each() is not None}))

    monkeypatch.setattr(Moments, "add", noted)
    module = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))).eval()
    forms = {str(index): (f"{index}.weight", FORM) for index in range(6)}
    assert len(round_in_order(trace(module, (torch.randn(9, 32),)), [{"input": torch.randn(9, 32)}], forms)) == 6
    assert most == 1
