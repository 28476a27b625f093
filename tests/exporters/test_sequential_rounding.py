"""Weights rounded one after the other, for the inputs that the rounded ones before give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gralora_fx import trace
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.quantize.block_arrays import dequantize_blocks
from gralora_fx.exporters.quantize.block_search import InputProducts
from gralora_fx.exporters.quantize.quantized_arrays import quantize_blocks
from gralora_fx.exporters.quantize.round_in_order import round_in_order

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
    """A layer's weight, rounded for inputs `[positions, in]`."""
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
