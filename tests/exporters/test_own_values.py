"""Modules of one's own whose inputs are no random numbers, or whose names have signs of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gralora_fx import LoraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

CONFIG = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


class Bags(nn.Module):
    """Means of bags of words, which begin at offsets: only such that begin at zero and rise are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(20, 16, mode="mean")
        self.linear = nn.Linear(16, 16)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = self.linear(self.bags(ids, offsets))
        return out


def test_an_input_with_rules_of_its_own_is_verified_with_the_samples_values(tmp_path: Path) -> None:
    ids, offsets = torch.randint(0, 20, (8,)), torch.tensor([0, 3, 5])
    model = rewrite(trace(Bags().eval(), {"ids": ids, "offsets": offsets}), CONFIG).eval()
    export_onnx(model, tmp_path / "onnx")
    found = load(tmp_path / "onnx")(ids=ids.numpy(), offsets=offsets.numpy())
    torch.testing.assert_close(torch.as_tensor(next(iter(found.values()))), model(ids, offsets).detach())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("up+down", nn.Linear(32, 32))
        self.add_module("up", nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(getattr(self, "up+down")(x).relu())
        return out


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_layer_whose_name_has_a_plus_is_quantized_as_any(quantize: str, tmp_path: Path) -> None:
    model = rewrite(trace(Named().eval(), (torch.randn(2, 5, 32),)), CONFIG)
    export_onnx(model.eval(), tmp_path / "onnx", quantize=quantize)  # which raises if its rounded weights are others
