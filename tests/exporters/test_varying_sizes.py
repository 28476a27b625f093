"""Operators whose translation would fix a size are exported for every size, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gralora_fx import DoraConfig, GraloraConfig, LoraConfig, merge, rewrite, trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

METHODS: list[Any] = [
    GraloraConfig(r=4, gralora_k=2, target_modules="all-linear"),
    LoraConfig(r=2, target_modules="all-linear"),
    DoraConfig(r=2, target_modules="all-linear"),
]


class Between(nn.Module):
    """Two linear layers with a function between, which may call a third module."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(16, 16), inner, nn.Linear(16, 16)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.inner, self.a(x)))  # type: ignore[no-any-return]


def over_length(pool: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda _, h: pool(h.transpose(1, 2), *args, **kwargs).transpose(1, 2)


def without_first(_: Any, h: Tensor) -> Tensor:
    h = h * 1
    h[:, 0] = 0
    return h


def positive_rows(_: Any, h: Tensor) -> Tensor:
    h = h * 1
    h[h.mean(-1) < 0] = 0
    return h


FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], nn.Module] | None]] = {
    "average of 4": (over_length(functional.adaptive_avg_pool1d, 4), None),
    "average of 3": (over_length(functional.adaptive_avg_pool1d, 3), None),
    "maximum of 3": (over_length(functional.adaptive_max_pool1d, 3), None),
    "average of an image": (lambda _, h: functional.adaptive_avg_pool2d(h, (3, 16)), None),
    "average of all": (lambda _, h: functional.adaptive_avg_pool1d(h.transpose(1, 2), 1).squeeze(-1), None),
    "linear interpolation": (over_length(functional.interpolate, scale_factor=2, mode="linear"), None),
    "maximum of 2": (lambda pool, h: pool(h.transpose(1, 2)).transpose(1, 2), lambda: nn.MaxPool1d(2)),
    "maximum of 3 around": (lambda pool, h: pool(h.transpose(1, 2)).mean(-1), lambda: nn.MaxPool1d(3, 2, 1, 1)),
    "maximum of 2 by position": (
        lambda _, h: functional.max_pool1d(h.transpose(1, 2), 2, None, 0, 1, False, False).transpose(1, 2),
        lambda: nn.MaxPool1d(2),
    ),
    "gru cell": (lambda cell, h: cell(h[:, 0], h[:, -1]), lambda: nn.GRUCell(16, 16)),
    "lstm cell": (lambda cell, h: cell(h[:, 0], (h[:, -1], h[:, 0]))[0], lambda: nn.LSTMCell(16, 16)),
    "tanh cell": (lambda cell, h: cell(h[:, 0]), lambda: nn.RNNCell(16, 16)),
    "relu cell": (lambda cell, h: cell(h[:, 0]), lambda: nn.RNNCell(16, 16, nonlinearity="relu")),
    "lstm": (lambda layer, h: layer(h)[0], lambda: nn.LSTM(16, 16, batch_first=True)),
    "largest of all": (lambda _, h: h - h.abs().amax(), None),
    "in-place power": (lambda _, h: h.tanh().pow_(2), None),
    "roll by half": (lambda _, h: h.roll(h.shape[1] // 2, 1), None),
    "parts": (lambda _, h: h.tensor_split(3, 1)[0], None),
    "every second twice": (lambda _, h: h[:, torch.arange(h.shape[1]) // 2], None),
    "divided by the length": (lambda _, h: h / h.shape[1] + h.shape[0], None),
    "slice assigned": (without_first, None),
    "rows assigned": (positive_rows, None),
    "hidden where short": (lambda _, h: h * (h.shape[1] > 8), None),
    "attention": (
        lambda layer, h: layer(h, h, h, need_weights=False)[0],
        lambda: nn.MultiheadAttention(16, 2, batch_first=True),
    ),
}


def adapted(name: str, config: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a rewritten trace with an adapter that changes something, and inputs of several sizes."""
    torch.manual_seed(0)
    function, inner = FUNCTIONS[name]
    model = Between(function, None if inner is None else inner()).eval()
    rewritten = rewrite(trace(model, (torch.randn(2, 8, 16),)), config)
    with torch.no_grad():
        for parameter in rewritten.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return rewritten, tuple(torch.randn(shape) for shape in ((2, 8, 16), (1, 7, 16), (3, 17, 16), (2, 4, 16)))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_export_is_right_at_every_size(name: str, precision: str, tmp_path: Path) -> None:
    model, inputs = adapted(name, METHODS[[*FUNCTIONS].index(name) % 3])
    export_onnx(model, tmp_path / "merged", precision=precision)
    served, tolerance = load(tmp_path / "merged"), 1e-4 if precision == "fp32" else 0.05
    for x in inputs:
        with torch.no_grad():
            expected = model(x).numpy()
        (output,) = served(x=x.numpy()).values()
        assert output.shape == expected.shape
        np.testing.assert_allclose(output, expected, atol=tolerance * float(np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "name", ["average of 3", "gru cell", "every second twice", "attention", "slice assigned", "rows assigned"]
)
def test_adapters_as_data_are_right_at_every_size(name: str, precision: str, tmp_path: Path) -> None:
    model, inputs = adapted(name, METHODS[0])
    export_onnx(model, tmp_path / "data", adapters="data", precision=precision)
    served = load(tmp_path / "data")
    merged = merge(model)
    for x in inputs:
        with torch.no_grad():
            expected = merged(x).numpy()
        (output,) = served(x=x.numpy(), adapter="default").values()
        tolerance = 1e-4 if precision == "fp32" else 0.05
        np.testing.assert_allclose(output, expected, atol=tolerance * float(np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("name", ["lstm", "parts", "average of 3", "roll by half"])
def test_a_pass_leaves_the_sizes_varying(name: str, tmp_path: Path) -> None:
    model, inputs = adapted(name, METHODS[0])

    def double(graph_module: fx.GraphModule) -> None:
        output = graph_module.graph.output_node()
        (result,) = output.all_input_nodes
        with graph_module.graph.inserting_before(output):
            output.replace_input_with(result, graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (result, 2)))

    model.add_pass(double)
    export_onnx(model, tmp_path / "passed")
    for x in inputs:
        with torch.no_grad():
            expected = model(x).numpy()
        (output,) = load(tmp_path / "passed")(x=x.numpy()).values()
        np.testing.assert_allclose(output, expected, atol=1e-4 * float(np.abs(expected).max()), rtol=0)


def test_a_squeeze_of_a_varying_axis_is_refused_by_name(tmp_path: Path) -> None:
    traced = trace(Between(lambda _, h: h.squeeze(1)).eval(), (torch.randn(2, 5, 16),))
    with pytest.raises(
        ExportError, match=r"aten\.squeeze\.dim at test_varying_sizes\.py:\d+ removes an axis at size 1"
    ):
        export_onnx(traced, tmp_path / "squeezed")
    assert not (tmp_path / "squeezed").exists()


def test_a_transform_without_onnx_form_is_refused_by_name_and_leaves_the_trace_as_it_was(tmp_path: Path) -> None:
    traced = trace(Between(lambda _, h: torch.fft.fft2(h).real).eval(), (torch.randn(2, 5, 16),))
    for _ in range(2):
        with pytest.raises(ExportError, match=r"no ONNX form of aten\.fft_fft2\.default at .* for other sizes"):
            export_onnx(traced, tmp_path / "transform")
    assert traced(torch.randn(3, 9, 16)).shape == (3, 9, 16)


def test_indices_of_a_pooling_over_two_axes_are_refused_by_name(tmp_path: Path) -> None:
    def places(_: Any, h: Tensor) -> Tensor:
        largest, indices = functional.adaptive_max_pool2d(h.unsqueeze(1), (3, 16), return_indices=True)
        return (largest + indices).squeeze(1)

    traced = trace(Between(places).eval(), (torch.randn(2, 8, 16),))
    with pytest.raises(ExportError, match=r"no ONNX form of aten\.adaptive_max_pool2d\.default at .* is not computed"):
        export_onnx(traced, tmp_path / "places")


def test_complex_inputs_are_refused_by_name(tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, signal: Tensor) -> Tensor:
            return self.a(signal.real) + signal.imag  # type: ignore[no-any-return]

    traced = trace(Parts().eval(), (torch.randn(2, 16, dtype=torch.complex64),))
    with pytest.raises(ExportError, match=r"complex numbers \(signal\), which ONNX Runtime does not"):
        export_onnx(traced, tmp_path / "complex")
