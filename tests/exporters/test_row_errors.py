"""Activations of int8-dynamic: channels brought nearer to each other, and 16 bits where 8 lose most."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gralora_fx import TracedModel, trace
from gralora_fx.exporters import export_onnx, fold_onnx
from gralora_fx.exporters.quantize import choice
from gralora_fx.serving import load

DYNAMIC: Any = "int8-dynamic"


class Uneven(nn.Module):
    """A layer whose channels differ by a thousand times, and one whose rows have a single large value each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.channels, self.spikes = nn.Linear(128, 64, bias=False), nn.Linear(128, 64, bias=False)
        self.register_buffer("scales", torch.linspace(-3.5, 3.5, 128).exp())
        self.register_buffer("power", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x * self.scales) / 30 + self.spikes(x.sign() * x.abs() ** self.power)


def traced() -> tuple[Uneven, TracedModel]:
    module = Uneven().eval()
    return module, trace(module, (torch.randn(8, 64, 128),))


def plain_plan(conversion: Any, verification: Any) -> Any:
    return conversion.plan


def error(directory: Path, module: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        exact = module(x)
    return float((load(directory)(x=x)[0] - exact).norm() / exact.norm())


def test_a_layer_whose_rows_lose_most_has_16_bits_and_is_named(tmp_path: Path) -> None:
    module, model = traced()
    report = export_onnx(model, tmp_path / "onnx", quantize=DYNAMIC)
    assert report.verification is not None
    assert report.verification.passed
    assert report.quantization is not None
    assert list(report.quantization.layers) == ["spikes.weight"]
    layer = report.quantization.layers["spikes.weight"]
    assert layer.form == "int8 in columns, activations rounded to 16 bits"
    assert layer.gain is not None
    assert layer.gain > 0
    assert "spikes.weight: int8 in columns, activations rounded to 16 bits" in str(report.quantization)
    with mock.patch.object(choice, "choose_formats", plain_plan):
        export_onnx(model, tmp_path / "plain", quantize=DYNAMIC)
    x = torch.randn(50, 3, 128)
    assert error(tmp_path / "onnx", module, x) < error(tmp_path / "plain", module, x) * 0.7


class Even(nn.Module):
    """A layer whose channels are alike, so that it loses nothing as it is, and one whose channels differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.alike, self.different = nn.Linear(128, 64, bias=False), nn.Linear(64, 32, bias=False)
        self.register_buffer("scales", torch.linspace(-3, 3, 64).exp())

    def forward(self, x: Tensor) -> Tensor:
        return self.different(self.alike(x.sign()) * self.scales)


def test_factors_are_those_that_cost_a_layer_least(tmp_path: Path) -> None:
    module = Even().eval()
    export_onnx(trace(module, (torch.randn(8, 64, 128),)), tmp_path / "onnx", quantize=DYNAMIC)
    graph = ir.load(tmp_path / "onnx" / "model.onnx").graph
    (factors,) = (value for name, value in graph.initializers.items() if name.endswith("_input_factors"))
    assert factors.name == "different.weight_input_factors"
    with mock.patch.object(choice, "choose_formats", plain_plan):
        export_onnx(trace(module, (torch.randn(8, 64, 128),)), tmp_path / "plain", quantize=DYNAMIC)
    x = torch.randn(50, 3, 128)
    assert error(tmp_path / "onnx", module, x) < error(tmp_path / "plain", module, x) * 0.7


def test_rows_of_what_has_factors_and_16_bits_are_rounded_alone(tmp_path: Path) -> None:
    _, model = traced()
    export_onnx(model, tmp_path / "onnx", quantize=DYNAMIC, verify=False)
    served, x = load(tmp_path / "onnx"), torch.randn(9, 3, 128)
    together, loud = served(x=x)[0], x.clone()
    loud[1:] *= 10
    assert torch.equal(served(x=x[:1])[0], together[:1])
    assert torch.equal(served(x=loud)[0][:1], together[:1])


def test_zeros_give_zeros(tmp_path: Path) -> None:
    _, model = traced()
    export_onnx(model, tmp_path / "onnx", quantize=DYNAMIC, verify=False)
    assert float(load(tmp_path / "onnx")(x=torch.zeros(2, 3, 128))[0].abs().max()) == 0


@pytest.mark.parametrize("with_factors", [True, False])
def test_an_update_is_folded_into_columns_with_factors(with_factors: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(128, 64, bias=False)).eval()
    x = torch.randn(40, 128) * torch.linspace(-3, 3, 128).exp()
    with mock.patch.object(choice, "choose_formats", choice.choose_formats if with_factors else plain_plan):
        export_onnx(trace(module, (x,)), tmp_path / "onnx", quantize=DYNAMIC)
    names = ir.load(tmp_path / "onnx" / "model.onnx").graph.initializers
    assert any(name.endswith("_input_factors") for name in names) == with_factors
    (tmp_path / "adapter").mkdir()
    A, B = torch.randn(4, 128) / 10, torch.randn(64, 4) / 10
    prefix = "base_model.model.0"
    save_file(
        {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["0"], "task_type": null}'
    )
    fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "folded", requantize=True)
    with torch.no_grad():
        module[0].weight += B @ A
        exact = module(x)
    actual = load(tmp_path / "folded")(input=x)[0]
    assert float((actual - exact).norm() / exact.norm()) < 0.02
    assert np.isfinite(actual.numpy()).all()
