"""Quantized exports of what is unusual: vectors, half precision, values that are not finite, tuples, branches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from damaged_exports import forget_digests
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor, nn
from traces import fresh_trace

from gralora_fx import trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import ExportReport, export_onnx, verify_onnx
from gralora_fx.exporters.formats import Blocks, Columns
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantize import calibration, choice
from gralora_fx.exporters.quantize.block_arrays import dequantize_columns
from gralora_fx.exporters.quantize.quantized_arrays import input_factors, quantize_blocks, quantize_columns
from gralora_fx.exporters.rules.products import block_products, column_products
from gralora_fx.exporters.rules.products.constant_matrices import ComputedTogether
from gralora_fx.serving import load

KINDS: Any = pytest.mark.parametrize("kind", ["int4", "int8-dynamic"])
CACHED = "text-generation-with-past"


class Column(nn.Module):
    """An output of one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.linear(x).squeeze(-1)
        return values


class Looked(nn.Module):
    """Rows of a table, whose squares are beyond float16, before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.table.weight.mul_(1000)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.linear(self.table(x.clamp(0, 63)))
        return values


class Spiky(nn.Module):
    """A layer whose rows would have 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.linear(x * x * x)
        return values


class Pair(nn.Module):
    """Two outputs, of layers that cost differently."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loud(x), 1e-3 * self.quiet(x)


class Branches(nn.Module):
    """A layer before layers of which one is run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        chosen: Tensor = torch.cond(x.sum() > 0, lambda x: self.left(x), lambda x: self.right(x) * 2, (x,))
        return chosen


class Rooted(nn.Module):
    """Outputs whose gradients are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * 0).sqrt()


def exported(module: nn.Module, x: Tensor, path: Path, kind: Any, **options: Any) -> ExportReport:
    return export_onnx(trace(module.eval(), (x,)), path, quantize=kind, **options)


def chosen_by(report: ExportReport) -> str:
    assert report.quantization is not None
    assert report.quantization.chosen_by is not None
    return report.quantization.chosen_by


@KINDS
@pytest.mark.parametrize(("module", "shape"), [(Column(), (4, 64)), (nn.Linear(64, 32), (64,)), (Spiky(), (128,))])
def test_vectors_are_measured(kind: Any, module: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape)
    report = exported(module, x, tmp_path / "onnx", kind)
    assert chosen_by(report).endswith("random inputs")
    assert report.quantization is not None
    assert kind == "int4" or len(shape) > 1 or not report.quantization.layers
    actual = load(tmp_path / "onnx")(**{"input" if isinstance(module, nn.Linear) else "x": x})[0]
    assert actual.shape == module(x).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_is_measured(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Looked()
    report = exported(module.to(dtype), torch.arange(12).reshape(3, 4), tmp_path / "onnx", "int8-dynamic")
    assert chosen_by(report) == "random inputs"


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind: Any, value: float, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        module[0].weight[3, 4] = value
    with pytest.raises(ExportError, match=r"weight holds values that are not finite.*mend the weights"):
        exported(module, torch.randn(4, 64), tmp_path / "onnx", kind, verify=False)
    with pytest.raises(ExportError, match=r"a matrix holds values that are not finite"):
        quantize_blocks(module[0].weight.detach().numpy(), Blocks(4, rounding="searched"))


def test_gradients_that_are_not_finite_leave_what_layers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, choose_formats = [], choice.choose_formats

    def noted(*arguments: Any) -> Any:
        plans.append(choose_formats(*arguments))
        return plans[-1]

    monkeypatch.setattr("gralora_fx.exporters.quantize.choice.choose_formats", noted)
    report = exported(Rooted(), torch.randn(4, 64), tmp_path / "onnx", "int4", bits=4, verify=False)
    assert "its values or gradients are not finite" in chosen_by(report)
    assert report.quantization is not None
    assert report.quantization.bits == 4
    assert set(plans[0].rounded) == {"linear.weight"}


def test_activations_that_are_not_finite_are_told(tmp_path: Path) -> None:
    class Roots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = self.linear(x.sqrt())
            return values

    for kind in ("int4", "int8-dynamic"):
        report = exported(Roots(), torch.rand(4, 64), tmp_path / kind, kind, verify=False)
        assert "not finite" in chosen_by(report)


def test_each_matrix_is_quantized_once_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    runs: list[int] = []
    barrier = threading.Barrier(2, timeout=0.2)

    def slowly(original: Any) -> Any:
        def run(*arguments: Any) -> Any:
            runs.append(1)
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait()
            return original(*arguments)

        return run

    for of in (block_products, column_products):
        monkeypatch.setattr(of, "ComputedTogether", lambda compute: made.append(ComputedTogether(compute)) or made[-1])
    monkeypatch.setattr(block_products, "quantize_blocks", slowly(block_products.quantize_blocks))
    monkeypatch.setattr(column_products, "quantize_columns", slowly(column_products.quantize_columns))
    for kind in ("int8", "int8-dynamic"):
        exported(nn.Linear(512, 512, bias=False), torch.randn(4, 512), tmp_path / kind, kind, verify=False)
    assert len(made) == len(runs) == 2
    assert not any(one._arrays for one in made)


@pytest.mark.parametrize("silent", [8, 600])
def test_a_channel_that_was_silent_may_be_loud_later(silent: int) -> None:
    generator = np.random.default_rng(0)
    x, matrix = np.maximum(generator.normal(size=(64, 1024)), 0).astype(np.float32), generator.normal(size=(1024, 64))
    x[:, :silent] = 0
    factors = input_factors(np.square(x).mean(0), 0.5)
    later = x[:16].copy()
    later[:, 0] = 1

    def error(factors: Any) -> float:
        values, scales = quantize_columns(matrix, "w", factors)
        own = np.ones(1024, np.float32) if factors is None else factors
        scaled = later * own
        step = np.abs(scaled).max(1, keepdims=True) / 127
        rounded = (scaled / step).round() * step / own
        exact = later @ matrix
        return float(
            np.linalg.norm(rounded @ dequantize_columns(values, scales, factors) - exact) / np.linalg.norm(exact)
        )

    assert error(factors) < 1.2 * error(None)
    assert (input_factors(np.zeros(4, np.float32), 0.5) == 1).all()


def test_outputs_in_a_tuple_are_measured(tmp_path: Path) -> None:
    report = exported(Pair(), torch.randn(4, 64), tmp_path / "onnx", "int4", bits=6)
    assert chosen_by(report) == "random inputs"
    assert report.quantization is not None
    assert [name for name, layer in report.quantization.layers.items() if layer.gain is not None] == ["loud.weight"]


def test_layers_in_branches_get_their_share(tmp_path: Path) -> None:
    report = exported(Branches(), torch.randn(4, 64), tmp_path / "onnx", "int4", bits=8)
    assert report.quantization is not None
    assert set(report.quantization.layers) == {"first.weight", "left.weight", "right.weight"}


def test_texts_are_cut_and_run_some_at_a_time_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["rates rose " * 300, *["rates rose again"] * 6, "a"]
    options = ExportOptions(quantize="int4", texts=texts, tokenizer=tiny_tokenizer(), verify=False)
    traced = fresh_trace("bert", num_labels=4)
    given = calibration._given(traced, options)
    assert given is not None
    cases = [case["attention_mask"] for case in calibration._batches(given)]
    assert sum(map(len, cases)) == 8
    assert max(map(len, cases)) == 6
    assert max(mask.numel() for mask in cases) <= 512
    assert all(bool(mask.all()) and mask.shape[1] <= 128 for mask in cases)
    monkeypatch.setattr(calibration, "_TEXTS", 3)
    few = calibration._given(traced, options)
    assert few is not None
    assert len(few) == 3


def _constants(model: ir.Model) -> Iterator[tuple[ir.Node, np.ndarray[Any, Any]]]:
    for node in model.graph.all_nodes():
        tensor = node.attributes["value"].as_tensor() if "value" in node.attributes else None
        if node.op_type == "Constant" and tensor is not None:
            yield node, tensor.numpy()


def test_verification_sees_a_wrong_remainder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExportOptions, "format", Columns(16))
    traced = trace(nn.Linear(128, 64, bias=False), (torch.randn(4, 128),))
    assert export_onnx(traced, tmp_path / "onnx", quantize="int8-dynamic").verification
    path = tmp_path / "onnx" / "model.onnx"
    model = ir.load(path)
    *_, rest = (node for node, value in _constants(model) if value.dtype == np.float32 and np.isclose(value, 1 / 254))
    rest.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.asarray(1 / 127, np.float32)))
    ir.save(model, path)
    forget_digests(tmp_path / "onnx")
    assert not verify_onnx(tmp_path / "onnx", traced, "quick").passed
