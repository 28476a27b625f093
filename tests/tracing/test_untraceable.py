"""Errors for what a graph cannot hold: one sentence, with the user's own line and what to do."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gralora_fx import LoraConfig, merge, rewrite, trace
from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.errors import TraceError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Outputs:
    first: Tensor
    rest: dict[str, Tensor]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)


def decide(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y  # the line to name


class If(Base):
    def forward(self, x: Tensor) -> Tensor:
        return decide(self.fc(x))


class While(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        while y.sum() < 10:  # the line to name
            y = y + 1
        return y


class Size(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y * int(x.abs().sum())  # the line to name


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = If()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return y


class Leaves(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.from_numpy(x.detach().numpy()))  # the line to name
        return y


class ReturnsSet(Base):
    def forward(self, x: Tensor) -> Any:  # the line to name
        return {self.fc(x)}


def line_to_name(kind: type[nn.Module]) -> int:
    """Return the marked line of a class, or of the function that it calls."""
    source: Any = decide if kind in (If, Inner) else kind
    lines, start = inspect.getsourcelines(source)
    return start + next(index for index, line in enumerate(lines) if "the line to name" in line)


@pytest.mark.parametrize(
    ("kind", "location", "message"),
    [
        (If, " at the root module", "needs the value of a tensor .*torch.where or torch.cond, or give the value as"),
        (Inner, " at branch", "needs the value of a tensor"),
        (While, " at the root module", "needs the value of a tensor"),
        (Size, " at the root module", "needs the value of a tensor"),
        (Leaves, " at the root module", "leaves PyTorch for numpy; compute with tensors"),
        (ReturnsSet, "", "returns a set, which a graph cannot make; return tensors"),
    ],
)
def test_the_users_line_is_named(kind: type[nn.Module], location: str, message: str) -> None:
    line = line_to_name(kind)
    with pytest.raises(
        TraceError,
        match=rf"^cannot trace {kind.__name__}{location} \(test_untraceable\.py:{line}\): the forward {message}",
    ) as caught:
        trace(kind(), (X,))
    assert "\n" not in str(caught.value)


def test_two_devices_are_named() -> None:
    with pytest.raises(TraceError, match="tensors of two devices meet; put the model and the example inputs on one"):
        trace(Base.__subclasses__()[0](), (X.to("meta"),))


class Item(Base):
    def forward(self, x: Tensor) -> Any:
        y: Tensor = self.fc(x)
        return {"y": y, "largest": y.max().item(), "rows": x.shape[0], "name": "item", "nothing": None}


class Nonzero(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y: Tensor = self.fc(x)
        return y[y > 0], y.nonzero()


class Dataclass(Base):
    def forward(self, x: Tensor) -> Outputs:
        y: Tensor = self.fc(x)
        return Outputs(y, {"twice": 2 * y})


class Writes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.add_(1))
        return y


@pytest.mark.parametrize("kind", [Item, Nonzero, Dataclass, Writes])
def test_outputs_of_other_kinds_are_the_models(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), X.clone()
    result = trace(model, (x,))
    assert torch.equal(x, X)
    for rows in (1, 3):
        actual, expected = result(X[:rows].clone()), model(X[:rows].clone())
        assert type(actual) is type(expected)
        for ours, theirs in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
            assert type(ours) is type(theirs)
            same = torch.allclose(ours, theirs, atol=1e-6) if isinstance(theirs, Tensor) else ours == theirs
            assert same or ours == pytest.approx(theirs)


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.fc(x)) + torch.randn(x.shape[0], 8)
        return y * torch.bernoulli(torch.full_like(x, 0.5))


class AlwaysDrops(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.fc(functional.dropout(x)))
        return y


@pytest.mark.parametrize("kind", [Noise, AlwaysDrops])
def test_random_numbers_in_evaluation_are_drawn_and_said(kind: type[nn.Module]) -> None:
    model = kind()
    with pytest.warns(
        UserWarning, match=r"draws random numbers in evaluation too \(aten.* at test_untraceable.py:\d+\)"
    ):
        result = trace(model, (X,))
    for mode in (True, False):
        model.train(mode)
        result.train(mode)
        torch.manual_seed(1)
        outputs = result(X)
        torch.manual_seed(1)
        assert torch.allclose(outputs, model(X), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(Dataclass(), (X,))


class Named(nn.Module):
    """A layer and a parameter of any name."""

    def __init__(self, layer: str, parameter: str) -> None:
        super().__init__()
        self.names = layer, parameter
        setattr(self, layer, nn.Linear(8, 8))
        self.register_parameter(parameter, nn.Parameter(torch.randn(8)))

    def forward(self, x: Tensor) -> Tensor:
        layer, parameter = (getattr(self, name) for name in self.names)
        return layer(x) + parameter


@pytest.mark.parametrize(
    ("layer", "parameter", "taken"),
    [
        ("graph", "b", "graph"),
        ("l", "code", "code"),
        ("recompile", "b", "recompile"),
        ("l", "_in_spec", "_in_spec"),
        ("l", "self", "self"),
        ("l", "gralora", "gralora"),
        ("self", "b", None),
        ("gralora", "additions", None),
    ],
)
def test_a_name_that_a_graph_module_has_is_refused_and_right_within_another_module(
    layer: str, parameter: str, taken: str | None
) -> None:
    model = Named(layer, parameter)
    if taken is not None:
        with pytest.raises(TraceError, match=f"'{taken}' of the Named has a name .*in which it is '0.{taken}'"):
            trace(model, (X,))
        model = nn.Sequential(model)
    gralora = rewrite(trace(model, (X,)), LoraConfig(r=2, target_modules=[layer], init_lora_weights=False)).train()
    gralora(X).sum().backward()
    assert torch.equal(copy.deepcopy(gralora)(X), gralora(X))
    assert (merge(gralora)(X) - gralora(X)).abs().max() < 1e-5


def test_a_graph_that_fails_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError):
        trace(If(), (X,))
    assert capfd.readouterr().err == ""
