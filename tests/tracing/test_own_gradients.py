"""Gradients that a model's code sets by itself are those of its trace, or a warning says that they are not."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import own_gradients as own
import peft
import pytest
import torch
from torch import Tensor, nn

from gralora_fx import DoraConfig, GraloraConfig, LoraConfig, merge, rewrite, trace
from gralora_fx.errors import TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

KINDS = [
    own.Straight,
    own.Adversarial,
    own.Several,
    own.Clipped,
    own.Unlearned,
    own.Final,
    own.Hooked,
    own.Masked,
    own.ModuleHooked,
    own.RootHooked,
]
CONFIGS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig(r=4, target_modules="all-linear"), peft.LoraConfig(r=4, target_modules="all-linear")),
    "dora": (DoraConfig(r=4, target_modules="all-linear"), None),
    "gralora": (GraloraConfig(r=4, target_modules="all-linear"), None),
}


def step(model: Any, x: Tensor, scale: float = 1.0) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return a model's outputs and the gradients of its input and parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    outputs = model(x)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    sum((scale * each * torch.linspace(0, 1, each.numel()).view_as(each)).sum() for each in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [each.detach() for each in outputs], {**gradients, "x": x.grad}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, own.Quantized])
def test_a_trace_has_the_gradients_of_its_model_at_every_size(kind: Any, training: bool) -> None:
    model, traced = kind(), None
    traced = trace(model, (torch.randn(2, 5, 16),)).train(training)
    model.train(training)
    for x in (torch.randn(2, 5, 16), torch.randn(3, 7, 16)):
        (expected, gradients), (outputs, own_gradients) = step(model, x), step(GraphOf(traced, model), x)
        torch.testing.assert_close(outputs, expected)
        assert_equal(own_gradients, gradients)


class GraphOf(nn.Module):
    """A trace with the parameters of its model."""

    def __init__(self, traced: Any, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["traced"] = traced
        self.a, self.b, self.c = model.a, model.b, model.c
        if hasattr(model, "inner"):
            self.inner = model.inner

    def forward(self, x: Tensor) -> Any:
        return self.traced(x)


def test_a_gradient_that_is_clipped_only_where_it_is_large_is_clipped_there() -> None:
    model = own.Clipped()
    traced, x = trace(model, (torch.randn(2, 5, 16),)), torch.randn(2, 5, 16)
    assert_equal(step(GraphOf(traced, model), x, 1e6)[1], step(model, x, 1e6)[1])
    assert float(step(model, x, 1e6)[1]["a.bias"].abs().max()) <= 1e3 * 10


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", [own.Straight, own.Adversarial, own.Several, own.Unlearned, own.ModuleHooked])
def test_adapters_train_as_those_of_peft(kind: Any, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 5, 16)
    rewritten = rewrite(trace(model, (x,)), CONFIGS[method][0])
    with torch.no_grad():
        for name, parameter in rewritten.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=0.2)
    rewritten.save_pretrained(tmp_path)
    oracle: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True)
    copies = [copy.deepcopy(rewritten)]
    if kind is not own.ModuleHooked:  # whose hooks are local
        copies.append(pickle.loads(pickle.dumps(rewritten)))
    for trained in (rewritten, *copies):
        for training in (False, True):
            outputs, gradients = step(trained.train(training), x)
            expected, peft_gradients = step(oracle.train(training), x)
            torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(gradients["x"], peft_gradients["x"], rtol=1e-3, atol=1e-3)
            norms = [sorted(float(g.norm()) for g in each.values()) for each in (gradients, peft_gradients)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_its_gradient_is_merged_and_exported_by_its_forward(kind: Any, tmp_path: Path) -> None:
    model = rewrite(trace(kind(), (torch.randn(2, 5, 16),)), CONFIGS["gralora"][0]).eval()
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        expected = model(x)
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        merged = merge(model)(x)
        torch.testing.assert_close(list(merged) if isinstance(merged, tuple) else [merged], expected)
    for name, options in {"merged": {}, "data": {"adapters": "data"}}.items():
        export_onnx(model, tmp_path / name, **options)
    outputs = load(tmp_path / "merged")(x=x.numpy()).values()
    for output, want in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, want, rtol=1e-4, atol=1e-4)


def test_a_hook_that_is_local_is_named_when_its_graph_is_pickled() -> None:
    with pytest.raises(TraceError, match=r"calls Hooked\.forward\.<locals>\.<lambda>, which is defined within"):
        pickle.dumps(trace(own.Hooked(), (torch.randn(2, 5, 16),)))


def test_hooks_are_kept_where_the_base_is_frozen() -> None:
    model = own.Hooked().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    traced = trace(model, (x,))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(step(GraphOf(traced, model), x)[1]["x"], step(model, x)[1]["x"])


class HookedNode(own.Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if h.grad_fn is not None:
            h.grad_fn.register_hook(lambda inputs, _: (2 * inputs[0],))
        return self.c(h)


class OldHook(own.Three):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_backward_hook(lambda _, inputs, outputs: (2 * inputs[0], *inputs[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (HookedNode, r"HookedNode differs from training the model in the gradient of the input x, .* a\.weight"),
        (OldHook, r"the trace has not the hook of b by register_backward_hook"),
    ],
)
def test_a_gradient_that_is_lost_is_named(kind: Any, told: str, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=told):
        trace(kind().to(dtype), (torch.randn(2, 5, 16, dtype=dtype),))


class Noisy(own.Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            h = h + torch.randn_like(h)
        return nn.functional.dropout(self.b(h), 0.3, self.training)


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, dropout=0.5, batch_first=True), 2),
        nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.AlphaDropout(0.5), nn.RReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1)),
        nn.Sequential(nn.Linear(16, 16)).requires_grad_(False),
    ],
    ids=["encoder", "dropouts", "gradients near zero", "frozen"],
)
def test_a_right_model_is_no_cause_of_a_warning(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(model, (torch.randn(2, 5, 16),))


def test_noise_in_training_alone_is_all_that_a_warning_names() -> None:
    with pytest.warns(UserWarning, match="the model itself") as told:
        trace(Noisy(), (torch.randn(2, 5, 16),))
    assert len(told) == 1


class Differentiating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.a(x).tanh().sum(), x)[0]


def test_a_forward_that_computes_gradients_is_refused_with_its_line() -> None:
    with pytest.raises(TraceError, match=r"\(test_own_gradients.py:\d+\): the forward computes gradients itself"):
        trace(Differentiating(), (torch.randn(2, 5, 16),))


def test_parameters_and_their_gradients_are_as_before_a_trace() -> None:
    model, x = own.Straight(), torch.randn(2, 5, 16)
    model(x).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    called: list[int] = []
    model.a.weight.register_post_accumulate_grad_hook(lambda _: called.append(1))
    trace(model, (x,))
    assert called == []
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, before)


def test_an_adapter_made_in_inference_mode_trains() -> None:
    x = torch.randn(2, 5, 16)
    traced = trace(own.Straight(), (x,))
    with torch.inference_mode():
        model = rewrite(traced, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["c"]))
    model.train()(x).sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
