"""Linear layers whose weight is computed: adapted beside the computed weight as PEFT does, never folded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from gralora_fx import GraloraConfig, merge, plan, rewrite, trace
from gralora_fx.errors import MergeError
from gralora_fx.exporters import export_onnx

LAYERS = ["first", "inner", "last"]


class Lower(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tril()


class Masked(nn.Linear):
    """Computes its weight in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


def lower(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", Lower())
    return layer


def masked(layer: nn.Linear) -> nn.Linear:
    return Masked(layer.in_features, layer.out_features)


def hooked(layer: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return hooked_weight_norm(layer)


class Net(nn.Module):
    def __init__(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), wrap(nn.Linear(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.inner(self.first(x))))


@pytest.mark.filterwarnings("ignore:.*was traced in evaluation mode", "ignore:.*not part of the trace")
@pytest.mark.parametrize("source", [lambda net: net, fx.symbolic_trace], ids=["exported", "symbolic"])
@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, orthogonal, lower, masked])
def test_a_computed_weight_is_adapted_as_by_peft_and_never_folded(
    wrap: Callable[[nn.Linear], nn.Module], source: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    net = Net(wrap).eval()
    traced = trace(source(net), (torch.randn(3, 8),))
    config = peft.GraloraConfig(r=4, target_modules=LAYERS, init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(net), config).eval()
    ours = rewrite(traced, GraloraConfig(r=4, target_modules=LAYERS))
    tensors = dict(theirs.named_parameters())
    for path in LAYERS:
        for name in "AB":
            getattr(ours.factors(path), name).data.copy_(tensors[f"base_model.model.{path}.gralora_{name}.default"])
    x = torch.randn(5, 8)
    expected, actual = theirs(x), ours(x)
    assert (expected - actual).abs().max() <= 1e-5 * expected.abs().max()
    expected.square().mean().backward()
    actual.square().mean().backward()
    theirs_grad = tensors["base_model.model.inner.gralora_A.default"].grad
    assert (ours.factors("inner").A.grad - theirs_grad).abs().max() <= 1e-4 * theirs_grad.abs().max()
    for fold in (merge, lambda model: model.merge_adapter(untie=True), lambda model: model.merge_and_unload()):
        with pytest.raises(MergeError, match="the weight of inner is computed from other parameters"):
            fold(ours)
    assert torch.equal(ours(x), actual)


def test_a_weight_norm_by_hooks_is_in_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(hooked).eval()
    traced = trace(net, (torch.randn(3, 8),))
    config = GraloraConfig(r=4, target_modules=LAYERS, init_weights=False)
    model = rewrite(traced, config)
    assert len(traced.site("inner").calls) == 1
    x = torch.randn(5, 8)
    before = model(x)
    model.factors("inner").B.data.zero_()
    assert not torch.equal(model(x), before)
    with pytest.raises(MergeError, match="the weight of inner is computed"):
        export_onnx(model, tmp_path / "onnx")
    rejected = plan(trace(fx.symbolic_trace(net), (x,)), config).rejected
    assert [(entry.site.path, "it has hooks" in entry.reason) for entry in rejected] == [("inner", True)]
