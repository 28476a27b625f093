"""Quantized exports: what onnxruntime-genai's builder quantizes, by ONNX Runtime's own quantizer, exactly."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from damaged_exports import shift_weight
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantize.block_arrays import dequantize_blocks, dequantize_columns
from gralora_fx.exporters.quantize.quantized_arrays import nearest_errors, quantize_blocks, quantize_columns

CACHED = "text-generation-with-past"
ALL_LINEAR = GraloraConfig(r=8, gralora_k=2, hybrid_r=2, alpha=8, target_modules="all-linear", init_weights=False)


def adapted(name: str, task: str | None = CACHED) -> GraloraModel:
    return rewrite(fresh_trace(name, task=task), ALL_LINEAR)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path / "model.onnx").graph)


@pytest.mark.parametrize(("name", "task"), [("llama", CACHED), ("gpt2", CACHED), ("gemma3", CACHED), ("bert", None)])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_quantized_exports_compute_what_the_rounded_model_does(
    name: str, task: str | None, kind: Any, tmp_path: Path
) -> None:
    report = export_onnx(adapted(name, task), tmp_path / "onnx", quantize=kind)
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.tolerance == 1e-4


def test_verification_sees_wrong_blocks(tmp_path: Path) -> None:
    model = adapted("llama")
    export_onnx(model, tmp_path / "onnx", quantize="int4", verify=False)
    assert verify_onnx(tmp_path / "onnx", model).passed
    shift_weight(tmp_path / "onnx", "_Q4")
    assert not verify_onnx(tmp_path / "onnx", model).passed


@pytest.mark.quick
@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_blocks_are_those_of_onnxruntimes_quantizer(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExportOptions, "format", Blocks(bits))
    module = nn.Linear(96, 40, bias=False)
    export_onnx(trace(module, (torch.randn(2, 96),)), tmp_path / "onnx", quantize=f"int{bits}", verify=False)  # type: ignore[arg-type]
    matrix = module.weight.detach().T.numpy()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="multiply")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 40])],
        [numpy_helper.from_array(np.ascontiguousarray(matrix), "w")],
    )
    quantizer = MatMulNBitsQuantizer(
        helper.make_model(graph), bits=bits, block_size=32, is_symmetric=False, accuracy_level=4
    )
    quantizer.process()
    theirs = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantizer.model.model.graph.initializer}
    ours = ir.load(tmp_path / "onnx" / "model.onnx").graph.initializers
    for suffix in (f"_Q{bits}", "_scales", "_zero_points"):
        (name,) = (name for name in ours if name.endswith(suffix))
        tensor = ours[name].const_value
        assert tensor is not None
        assert np.array_equal(tensor.numpy(), theirs[f"w{suffix}"])


@pytest.mark.quick
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("scale_bits", [16, 32])
def test_errors_of_rounding_to_nearest_are_those_of_the_blocks(bits: int, zero_points: bool, scale_bits: int) -> None:
    form = Blocks(bits, zero_points=zero_points, scale_bits=scale_bits)
    rows = np.random.default_rng(0).standard_normal((40, 72)).astype(np.float32)  # 72: the last block is a part of one
    rows[3], rows[5, 7], rows[7] = 0, 50, np.abs(rows[7])
    blocks = quantize_blocks(np.ascontiguousarray(rows.T), form)
    expected = np.square(dequantize_blocks(blocks, bits, 72) - rows).sum(1)
    assert np.allclose(nearest_errors(rows, form), expected, rtol=1e-4, atol=1e-9)
    assert nearest_errors(rows, form)[3] == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_decode_as_the_operator_decodes_them(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(72, 24, bias=False)  # 72: the last block is a part of one
    form = Blocks(bits, accuracy_level=1)
    monkeypatch.setattr(ExportOptions, "format", form)
    export_onnx(trace(module, (torch.randn(2, 72),)), tmp_path / "onnx", quantize=f"int{bits}", accuracy_level=1)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (identity,) = session.run(None, {session.get_inputs()[0].name: np.eye(72, dtype=np.float32)})
    matrix = np.ascontiguousarray(module.weight.detach().T.numpy())
    assert np.allclose(identity, dequantize_blocks(quantize_blocks(matrix, form), bits, 72).T, atol=1e-6)


def test_a_head_and_the_embedding_tied_to_it_are_stored_once(tmp_path: Path) -> None:
    traced = fresh_trace("gpt2", task=CACHED)
    report = export_onnx(traced, tmp_path / "onnx", quantize="int4")
    assert report.quantization is not None
    counts = operators(tmp_path / "onnx")
    assert (counts["MatMulNBits"], counts["GatherBlockQuantized"], counts["MatMul"]) == (9, 1, 0)
    stored = ir.load(tmp_path / "onnx" / "model.onnx").graph.initializers
    assert not [name for name in stored if name in ("lm_head.weight", "transformer.wte.weight")]
    manifest = json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())
    assert manifest["quantization"] == {
        "kind": "int4",
        "block_size": 32,
        "accuracy_level": 4,
        "exact_on": None,
        "zero_points": True,
        "multiplications": 9,
        "lookups": 1,
        "values": sum(site.weight.numel() for site in traced.sites),
        "bits": pytest.approx(4.5, abs=0.2),
        "stored_bits": pytest.approx(5.1, abs=0.3),
        "needs_folding": True,
        "digests": {name: ANY for name in stored if name.endswith("_Q4")},
        "chosen_by": "16 texts of 31 tokens that the model drew",
        "layers": {name: dataclasses.asdict(layer) for name, layer in report.quantization.layers.items()},
    }
    assert report.verification is not None
    assert report.verification.passed


def test_an_embedding_whose_rows_are_no_whole_blocks_keeps_its_precision(tmp_path: Path) -> None:
    report = export_onnx(fresh_trace("gpt2", task=CACHED), tmp_path / "onnx", quantize="int4", block_size=64)
    assert operators(tmp_path / "onnx")["GatherBlockQuantized"] == 0
    assert report.verification is not None
    assert report.verification.passed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_quantized_weights_go_with_half_precision(precision: Any, tmp_path: Path) -> None:
    report = export_onnx(adapted("llama"), tmp_path / "onnx", precision=precision, quantize="int4")
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.weights == f"int4, else {precision}"


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mixing = nn.Linear(64, 32), nn.Parameter(torch.ones(3, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.up(x).unsqueeze(0).expand(3, -1, -1), self.mixing)


def test_biases_are_added_behind_and_no_batch_of_matrices_is_touched(tmp_path: Path) -> None:
    report = export_onnx(trace(Biased(), (torch.randn(2, 64),)), tmp_path / "onnx", quantize="int8")
    counts = operators(tmp_path / "onnx")
    assert (counts["MatMulNBits"], counts["MatMul"]) == (1, 1)
    assert report.verification is not None
    assert report.verification.passed


class Unlisted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mixing = nn.Linear(64, 32), nn.Parameter(torch.ones(3, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.up(x).unsqueeze(1), self.mixing[0])


def test_a_constant_matrix_that_is_not_a_linear_layer_stays_float(tmp_path: Path) -> None:
    report = export_onnx(trace(Unlisted(), (torch.randn(2, 64),)), tmp_path / "onnx", quantize="int8")
    counts = operators(tmp_path / "onnx")
    assert (counts["MatMulNBits"], counts["MatMul"]) == (1, 1)
    assert report.verification is not None
    assert report.verification.passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantize": "int3"},
            "quantize='int3' is not available; take 'int4' or 'int8' or 'int8-dynamic' or 'kept' or 'float', or leave "
            "it out",
        ),
        ({"quantize": "int4", "block_size": 24}, "block_size=24 is not a block size; take a power of two, 16 or more"),
        ({"quantize": "int4", "block_size": 8}, "block_size=8 is not a block size"),
        ({"quantize": "int8", "block_size": True}, "block_size=True is not a block size"),
        ({"quantize": "int8", "accuracy_level": 5}, "accuracy_level=5 is not an accuracy level; take 0"),
        ({"quantize": "int8", "accuracy_level": -1}, "accuracy_level=-1 is not an accuracy level"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    traced = trace(nn.Linear(8, 8), (torch.randn(2, 8),))
    with pytest.raises(ExportError, match=message):
        export_onnx(traced, tmp_path / "onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_of_rounded_training_rounds_as_an_export_does() -> None:
    from benchmarks.rounded_training import NEAREST, rounded_blocks, rounded_columns

    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    matrix = np.ascontiguousarray(weight.numpy().T)
    blocks = dequantize_blocks(quantize_blocks(matrix, NEAREST), NEAREST.bits, 96)
    assert np.array_equal(blocks, rounded_blocks(weight).numpy())
    columns = dequantize_columns(*quantize_columns(matrix, "w"))
    assert np.array_equal(columns.T, rounded_columns(weight).numpy())
