"""Small models as hypothesis draws them, and how often it draws."""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from traces import inputs_of, source, traced
from transformers.pytorch_utils import Conv1D

from gralora_fx import TracedModel, trace

EXAMPLES = int(os.environ.get("EXAMPLES", "0"))
SHARE = 2 if "SAMPLE_EXAMPLES" in os.environ else 1  # `make test` draws half of them


def examples(committed: int, **options: Any) -> settings:
    """Return settings of a property that draws so many examples in a usual run."""
    return settings(
        max_examples=EXAMPLES or committed // SHARE,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],  # drawing a model traces it
        **options,
    )


LINEAR_KINDS = ("linear", "conv1d", "functional", "residual", "twice", "nested", "tied")
KINDS = (*LINEAR_KINDS, "norm", "relu", "relu in place")
RESIZING = ("linear", "conv1d", "functional", "nested")  # the others keep the width


class Functional(nn.Module):
    """A linear layer that is none: `F.linear` on a parameter of its own."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Residual(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class Twice(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.proj.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.tanh(self.fc(x)))


@dataclass(frozen=True)
class Layer:
    kind: str
    inputs: int
    outputs: int
    bias: bool

    def build(self) -> nn.Module:
        i, o, bias = self.inputs, self.outputs, self.bias
        makers: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(i, o, bias),
            "conv1d": lambda: Conv1D(o, i),
            "functional": lambda: Functional(i, o, bias),
            "residual": lambda: Residual(i, bias),
            "twice": lambda: Twice(i, bias),
            "tied": lambda: Tied(i, bias),
            "nested": lambda: nn.Sequential(
                OrderedDict(
                    fc=nn.Linear(i, o, bias), then=nn.Sequential(OrderedDict(act=nn.Tanh(), fc=nn.Linear(o, o, bias)))
                )
            ),
            "norm": lambda: nn.LayerNorm(i),
            "relu": nn.ReLU,
            "relu in place": lambda: nn.ReLU(inplace=True),
        }
        return makers[self.kind]()


class Net(nn.Module):
    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer.build() for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class NetSpec:
    """A net to be built.

    Attributes:
        layers: Its layers, in order.
        rank: Axes of its input, features included.
        dtype: Dtype of its parameters.
        is_exported: Whether it is traced by `torch.export`, rather than symbolically (which takes milliseconds).
    """

    layers: tuple[Layer, ...]
    rank: int
    dtype: torch.dtype
    is_exported: bool


@dataclass(frozen=True)
class Case:
    """A traced model to adapt.

    Attributes:
        source: The model itself.
        traced: Its trace, to be read only.
        inputs: Inputs of other sizes than it was traced with.
        is_net: Whether it is one of the plain nets.
    """

    source: nn.Module
    traced: TracedModel
    inputs: dict[str, Tensor]
    is_net: bool

    @property
    def tolerance(self) -> float:
        """Return the largest difference of two ways of computing the same, relative to the largest value."""
        dtypes = {parameter.dtype for parameter in self.source.parameters()}
        return max({torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype] for dtype in dtypes)


@functools.lru_cache(maxsize=64)
def built(spec: NetSpec) -> tuple[Net, TracedModel]:
    """Return the net of a spec and its trace, to be read only."""
    torch.manual_seed(0)
    net = Net(spec.layers).to(spec.dtype).eval()
    example = {"x": torch.randn(*[3, 2, 4][: spec.rank - 1], spec.layers[0].inputs, dtype=spec.dtype)}
    return net, trace(net if spec.is_exported else fx.symbolic_trace(net), example)


@st.composite
def layer_lists(draw: st.DrawFn) -> tuple[Layer, ...]:
    """One to four layers, one of them linear, whose widths are multiples of one number."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).filter(set(LINEAR_KINDS).intersection))
    unit = draw(st.sampled_from([4, 6, 2, 3, 1]))
    widths = st.integers(1, 3).map(lambda factor: factor * unit)
    width, layers = draw(widths), []
    for kind in kinds:
        outputs = draw(widths) if kind in RESIZING else width
        layers.append(Layer(kind, width, outputs, bias=draw(st.booleans())))
        width = outputs
    return tuple(layers)


@st.composite
def net_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Case:
    """Return a plain net and an input of one to four axes, with empty ones and transposed ones among them."""
    layers = draw(layer_lists())
    is_one_value = layers[0].inputs == 1  # as an input of one axis: `trace` takes it for a batch of one and widens it
    rank = draw(st.integers(2 if is_one_value else 1, 4))
    spec = NetSpec(layers, rank, draw(st.sampled_from(dtypes)), is_exported=draw(st.booleans()))
    note(f"{spec}")
    net, net_trace = built(spec)
    leading = draw(st.lists(st.integers(0, 5), min_size=spec.rank - 1, max_size=spec.rank - 1), label="leading axes")
    shape = [*leading, spec.layers[0].inputs]
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)
    if draw(st.booleans(), label="transposed in memory"):
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    return Case(net, net_trace, {"x": x}, is_net=True)


def cases(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> st.SearchStrategy[Case]:
    """Plain nets, and now and then a tiny transformer."""
    names = st.sampled_from(["bert", "gpt2"])
    transformers = names.map(lambda name: Case(source(name), traced(name), inputs_of(name), is_net=False))
    nets = net_cases(dtypes)
    return st.integers(0, 9).flatmap(lambda number: transformers if number == 9 else nets)


ALPHAS = st.one_of(st.integers(1, 32), st.floats(2**-6, 32, width=32))
