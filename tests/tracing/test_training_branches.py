"""Branches of training alone: stochastic depth is part of a trace, any other branch is named in a warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx

IMAGES = {
    "dinov2": lambda: Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, drop_path_rate=0.5
        )
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=4, drop_path_rate=0.5
        )
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=32, drop_path_rate=0.5)
    ),
}


@pytest.fixture(params=IMAGES)
def dropping(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = IMAGES[request.param]().eval()
    for parameter in model.parameters():  # some are initialised so small that no branch matters
        nn.init.normal_(parameter, std=0.3)
    return model


def pixels(model: Any, batch: int = 6) -> Tensor:
    size = model.config.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_stochastic_depth_draws_as_the_model_does_in_training_and_not_in_evaluation(dropping: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        traced = trace(dropping)
    x = pixels(dropping)
    with torch.no_grad():
        expected = dropping(pixel_values=x).logits
        assert torch.allclose(traced(pixel_values=x).logits, expected, atol=1e-5)
        drawn = []
        for model in (dropping.train(), traced.train()):
            torch.manual_seed(7)
            drawn.append(model(pixel_values=x).logits)
        assert torch.allclose(*drawn, atol=1e-5)
        assert not torch.allclose(drawn[1], expected, atol=1e-2)
        assert torch.allclose(traced.eval()(pixel_values=x).logits, expected, atol=1e-5)


def test_stochastic_depth_is_not_in_an_export(tmp_path: Any) -> None:
    torch.manual_seed(0)
    traced = trace(IMAGES["dinov2"]().train())
    model = rewrite(traced, GraloraConfig(r=4, target_modules={"fc1"}, init_weights=False))
    assert export_onnx(model, tmp_path / "onnx").verification.passed


class Noisy(nn.Module):
    """Adds what is asked for in training."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self.kind == "draws":
                return x + torch.randn_like(x)
            if self.kind == "scales":
                return x * 3
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.noises = nn.ModuleList([nn.Identity(), Noisy(kind)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.5, self.training)
        for noise in self.noises:
            x = noise(x)
        return self.second(x)


@pytest.mark.parametrize("kind", ["draws", "scales", "updates"])
def test_a_branch_of_training_is_named_and_the_rest_trains_as_ever(kind: str) -> None:
    model = Net(kind)
    with pytest.warns(UserWarning, match=r"noises\.1 \(Noisy\) differs in training .*as in evaluation"):
        traced = trace(model, (torch.randn(3, 8),))
    assert model.training
    x = torch.randn(4, 8)
    assert not torch.equal(traced(x), traced(x))  # dropout beside the branch
    assert torch.allclose(traced.eval()(x), model.eval()(x), atol=1e-6)
    assert not model.noises[1].mean.any()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x)


def test_a_buffer_that_either_mode_updates_is_not_a_training_branch() -> None:
    model = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        traced = trace(model, (torch.randn(3, 8),))
    traced.eval()(torch.randn(2, 8))
    assert model.calls == 1
