"""Layers that a forward calls several times, registers again or ties to another: each call is adapted as in PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_model
from torch import Tensor, fx, nn
from traces import relative_error

from gralora_fx import GraloraModel, LoraConfig, merge, plan, trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

METHODS = {
    "GRALORA": {"r": 4, "gralora_k": 2, "alpha": 8},
    "LORA": {"r": 4, "lora_alpha": 8},
    "DORA": {"r": 4, "lora_alpha": 8},
}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """Two layers, called as a function says; `again` is `first` under another name, `tied` has its weight."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)
        self.tied = nn.Linear(8, 8, bias=bias)
        self.tied.weight = self.first.weight
        self.again = self.first
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.same = self.block
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(m.first(x))
    return m.second(x)  # type: ignore[no-any-return]


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "twice in a row": lambda m, x: m.second(m.first(m.first(x))),
    "with something between": lambda m, x: m.first(torch.relu(m.first(x))),
    "in a loop": in_a_loop,
    "on two inputs": lambda m, x: m.first(x) * m.second(m.first(2 * x)),
    "in two blocks of one module": lambda m, x: m.same(m.block(m.second(x))),
    "under another name": lambda m, x: m.second(torch.tanh(m.again(x)) + m.first(3 * x)),
    "with a tied weight": lambda m, x: m.tied(torch.tanh(m.first(x))),
}


def both(name: str, method: str, directory: Path, *, bias: bool = True) -> tuple[nn.Module, GraloraModel]:
    """Return PEFT's model and ours with its checkpoint, in evaluation mode."""
    model = Calls(FORWARDS[name], bias=bias).eval()
    fields = {**METHODS[method], "target_modules": ["first", "second", "block.0"]}
    theirs = peft_model(copy.deepcopy(model), method=method, **fields)  # type: ignore[arg-type]
    theirs.save_pretrained(str(directory))
    return theirs, GraloraModel.from_pretrained(trace(model, (X,)), directory).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FORWARDS)
def test_outputs_gradients_and_merged_outputs_are_pefts(name: str, method: str, tmp_path: Path) -> None:
    theirs, ours = both(name, method, tmp_path)
    expected = theirs(X)
    assert relative_error(ours(X), expected) < 1e-5
    assert relative_error(ours(X[:1, :2]), theirs(X[:1, :2])) < 1e-5
    expected.square().sum().backward()
    ours(X).square().sum().backward()
    wanted = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.requires_grad and p.grad is not None)
    given = sorted(float(p.grad.norm()) for p in ours.parameters() if p.requires_grad and p.grad is not None)
    assert given == pytest.approx(wanted, rel=1e-4)
    assert relative_error(merge(ours, untie=True)(X), expected) < 1e-5
    ours.merge_adapter(untie=True)
    assert relative_error(ours(X), expected) < 1e-5


@pytest.mark.parametrize("adapters", ["merged", "data"])
@pytest.mark.parametrize("name", ["twice in a row", "under another name", "with a tied weight"])
def test_exports_adapt_the_calls_that_peft_adapts(name: str, adapters: Any, tmp_path: Path) -> None:
    theirs, ours = both(name, "GRALORA", tmp_path)
    exported = merge(ours, untie=True) if adapters == "merged" else ours
    export_onnx(exported, tmp_path / "onnx", adapters=adapters)
    chosen = {} if adapters == "merged" else {"adapter": "default"}
    assert relative_error(torch.as_tensor(load(tmp_path / "onnx")(x=X, **chosen)[0]), theirs(X)) < 1e-5


def test_a_layer_that_computes_what_another_does_with_its_weight_is_no_data(tmp_path: Path) -> None:
    FORWARDS["the same"] = lambda m, x: m.second(torch.tanh(m.tied(x)) + m.first(x))
    try:
        _, ours = both("the same", "LORA", tmp_path, bias=False)
    finally:
        del FORWARDS["the same"]
    with pytest.raises(ExportError, match=r"no adapter can be data at first: .*shared with a layer that computes"):
        export_onnx(ours, tmp_path / "onnx", adapters="data", verify=False)


def test_the_plan_says_that_a_layer_is_registered_again() -> None:
    traced = trace(Calls(FORWARDS["under another name"]), (X,))
    reasons = {
        entry.site.path: entry.reason for entry in plan(traced, LoraConfig(target_modules="all-linear")).rejected
    }
    assert "it is first, registered again" in reasons["again"]


def test_a_model_is_as_before_after_a_trace_of_modules_with_two_names() -> None:
    model = Calls(FORWARDS["under another name"])
    trace(model, (X,))
    assert model.again is model.first
    assert model.same[0] is model.block[0]


class Shifted(nn.Linear):
    """A layer that moves its input, and adds to its product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(0, 1)).transpose(0, 1) + 1


class Rectified(nn.Linear):
    """A layer that changes its input."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.relu())


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("kind", "reaches"), [(Shifted, True), (Rectified, False)])
def test_only_what_a_call_itself_computes_keeps_an_adapter_away(
    kind: type[nn.Linear], reaches: bool, symbolic: bool
) -> None:
    model = Calls(FORWARDS["twice in a row"])
    model.first = kind(8, 8)
    traced = trace(fx.symbolic_trace(model) if symbolic else model, (X,))
    site = next(site for site in traced.sites if site.path == "first")
    assert len(site.calls) == 2
    assert ("first" not in traced.out_of_reach) is reaches
