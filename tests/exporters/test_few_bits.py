"""int4 with more bits where rounding costs most: what is measured, what is chosen, and commands over the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor, nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.core.tracing.inputs.cache import empty_cache
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, fold_onnx, verify_onnx
from gralora_fx.exporters.formats import Blocks, Format
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantize.block_arrays import dequantize_blocks
from gralora_fx.exporters.quantize.block_search import InputProducts
from gralora_fx.exporters.quantize.plan import QuantizationPlan
from gralora_fx.exporters.quantize.quantized_arrays import quantize_blocks
from gralora_fx.exporters.quantize.sensitivity import measure_sensitivities
from gralora_fx.exporters.verify.outputs import step_inputs
from gralora_fx.format.input_names import PAST
from gralora_fx.format.manifest import read_manifest
from gralora_fx.serving import load

CACHED = "text-generation-with-past"
LORA = GraloraConfig(r=4, gralora_k=2, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_weights=False)
# formats that differ within what is packed, within what is merged, and between layers
MIXED: Mapping[str, Format | None] = {
    "model.layers.0.self_attn.v_proj.weight": Blocks(8, 16),
    "model.layers.0.mlp.up_proj.weight": Blocks(8),
    "model.layers.1.self_attn.k_proj.weight": None,
    "model.layers.1.mlp.down_proj.weight": Blocks(8),
}


class Loud(nn.Module):
    """Two layers of one width, of which the output shows one a thousand times more."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x) + 1e-3 * self.quiet(x)


def bits_of(directory: Path) -> dict[str, int]:
    """Bits of every product's blocks, by the name of its integers."""
    nodes = ir.load(directory / "model.onnx").graph.all_nodes()
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    return {
        str(node.inputs[1].name): node.attributes["bits"].as_int() for node in products if node.inputs[1] is not None
    }


def choose(monkeypatch: pytest.MonkeyPatch, by_matrix: Mapping[str, Format | None] = MIXED) -> None:
    """Let exports have formats that nothing measured."""
    plan = QuantizationPlan(Blocks(4, rounding="searched"), by_matrix)
    monkeypatch.setattr("gralora_fx.exporters.quantize.choice.choose_formats", lambda *_: plan)


def test_bits_go_where_rounding_costs_most(tmp_path: Path) -> None:
    report = export_onnx(trace(Loud(), (torch.randn(2, 64),)), tmp_path / "onnx", quantize="int4", bits=6)
    assert bits_of(tmp_path / "onnx") == {"loud.weight_Q8": 8, "quiet.weight_Q4": 4}
    spent = report.quantization
    assert spent is not None
    assert spent == read_manifest(tmp_path / "onnx").quantization
    assert (spent.bits, spent.chosen_by) == (6, "random inputs")
    assert spent.stored_bits == (4 + 1 / 2 + 1 / 8 + 8 + 1 / 4 + 1 / 8) / 2
    assert {name: layer.form for name, layer in spent.layers.items()} == {
        "loud.weight": "int8 in blocks of 64",
    }
    assert f"loud.weight: int8 in blocks of 64 (saves {spent.layers['loud.weight'].gain:.2e})" in report.details
    assert "depend on how many" not in report.details


def test_blocks_by_which_tokens_depend_on_others_are_named(tmp_path: Path) -> None:
    traced = trace(Loud(), (torch.randn(2, 64),))
    for kind, size, is_named in (("int4", 64, True), ("int8", 64, False), ("int8", 128, True)):
        report = export_onnx(traced, tmp_path / "onnx", quantize=kind, block_size=size, overwrite=True, verify=False)
        assert ("the last digits of a token depend on how many" in report.details) == is_named


def test_without_bits_to_spend_blocks_stay_narrow(tmp_path: Path) -> None:
    report = export_onnx(trace(Loud(), (torch.randn(2, 64),)), tmp_path / "onnx", quantize="int4", bits=4)
    assert report.quantization is not None
    assert (report.quantization.stored_bits, report.quantization.layers) == (4 + 1 / 2 + 1 / 8, {})


@pytest.mark.parametrize(("bits", "expected"), [(4, {4}), (4.5, {4}), (8, {8})])
def test_a_budget_is_kept(bits: float, expected: set[int], tmp_path: Path) -> None:
    report = export_onnx(trace(Loud(), (torch.randn(2, 64),)), tmp_path / "onnx", quantize="int4", bits=bits)
    assert set(bits_of(tmp_path / "onnx").values()) == expected
    assert report.quantization is not None
    assert report.quantization.bits is not None
    assert report.quantization.bits <= bits


def test_the_measure_is_the_divergence_that_a_change_brings() -> None:
    traced = fresh_trace("llama", task=CACHED, tie_word_embeddings=True).eval()
    with torch.no_grad():
        for parameter in traced.tree.parameters.values():
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # attention that attends to something
    ids = torch.randint(3, 99, (4, 24), generator=torch.Generator().manual_seed(0))
    inputs = {**traced.constants, **step_inputs(ids, torch.ones_like(ids), traced.input_names)}
    cases = [{**inputs, PAST: empty_cache(traced.example_inputs[PAST], 4)} for _ in range(16)]
    before = {name: parameter.requires_grad for name, parameter in traced.tree.parameters.items()}
    measured = measure_sensitivities(traced, cases)
    assert {name: parameter.requires_grad for name, parameter in traced.tree.parameters.items()} == before
    assert all(parameter.grad is None for parameter in traced.tree.parameters.values())

    def log_probabilities() -> Tensor:
        outputs = traced(**inputs, past_key_values=empty_cache(traced.example_inputs[PAST], 4))
        return outputs["logits"].double().log_softmax(-1)

    direct, expected = {}, {}
    with torch.no_grad():
        base = log_probabilities()
        for site in traced.sites:
            weight = site.weight.clone()
            change = 0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            site.weight.add_(change)
            changed = log_probabilities()
            site.weight.copy_(weight)
            direct[site.path] = float((base.exp() * (base - changed)).sum(-1).mean())
            expected[site.path] = measured.loss(site.path, change.square())
    assert set(measured.tables) == {"lm_head"}
    for path, value in direct.items():
        assert 0.3 < expected[path] / value < 3, path
    assert 0.7 < sum(expected.values()) / sum(direct.values()) < 1.4


def test_a_search_rounds_better_than_the_nearest_and_than_onnxruntimes_k_quant() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((128, 300)).astype(np.float32)
    importance = generator.random(128).astype(np.float32) ** 8

    inputs = (
        generator.standard_normal((600, 128)).astype(np.float32) @ generator.standard_normal((128, 128)) * importance
    )
    products = torch.zeros(1, 256, 256)
    products[0, :128, :128] = torch.from_numpy(inputs.T @ inputs / 600).float()

    def error(values: Any, of_inputs: bool = False) -> float:
        change = values - matrix.T
        return float(np.square(inputs @ change.T if of_inputs else change).mean())

    def blocks(rounding: Any, known: Any = None) -> Any:
        return dequantize_blocks(quantize_blocks(matrix, Blocks(4, rounding=rounding), known), 4, 128)

    integers, scales, zeros = quant_tensor_k_quant_cpu(matrix.T.reshape(-1, 32), 4, 32)
    theirs = ((integers - zeros) * scales).reshape(300, 128)
    assert error(blocks("searched")) < 0.95 * min(error(theirs), error(blocks("nearest")))
    assert error(blocks("searched", InputProducts(products)), True) < 0.6 * error(blocks("searched"), True)


def test_zeros_and_one_value_a_block_are_kept(tmp_path: Path) -> None:
    for value in (0.0, 0.5, -3.0):
        matrix = np.full((64, 2), value, np.float32)
        rounded = dequantize_blocks(quantize_blocks(matrix, Blocks(4, rounding="searched")), 4, 64)
        assert np.allclose(rounded, value, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"adapters": "data"}, {"precision": "fp16"}])
def test_formats_that_differ_are_one_model(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch)
    model = rewrite(fresh_trace("llama", task=CACHED), LORA)
    report = export_onnx(model, tmp_path / "onnx", quantize="int4", verify="full", **options)
    assert report.verification is not None
    assert report.verification.passed
    assert set(bits_of(tmp_path / "onnx").values()) == {4, 8}
    layers = read_manifest(tmp_path / "onnx").quantization
    assert layers is not None
    assert layers.layers["model.layers.1.self_attn.k_proj.weight"].form == "float"
    assert layers.layers.keys() == MIXED.keys()
    adapter = {"adapter": "default"} if options.get("adapters") else {}
    served = load(tmp_path / "onnx").generate(input_ids=np.array([[5, 6, 7]]), max_new_tokens=4, **adapter)
    assert len(served) == 1


def test_an_adapter_is_folded_into_formats_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = rewrite(load_traced(str(tmp_path / "base"), None, CACHED), LORA)
    model.save_pretrained(tmp_path / "adapter")
    export_onnx(model.traced, tmp_path / "onnx", quantize="int4")
    options = {"requantize": True, "base": tmp_path / "base", "force": True}
    fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "folded", **options)  # type: ignore[arg-type]
    assert bits_of(tmp_path / "folded") == bits_of(tmp_path / "onnx")
    assert verify_onnx(tmp_path / "folded", GraloraModel.from_pretrained(model.traced, tmp_path / "adapter")).passed


def test_texts_that_choose_are_not_those_that_are_compared(tmp_path: Path) -> None:
    texts = ["rates rose again", "the match was lost", "a new phone", "a film"]
    options = ExportOptions(quantize="int4", texts=texts, tokenizer=".")
    assert options.choosing_texts == [texts[0], texts[2]]
    assert options.compared_texts == [texts[1], texts[3]]
    assert ExportOptions(quantize="int8", texts=texts, tokenizer=".").compared_texts == texts
    assert ExportOptions(quantize="int4", texts=texts, tokenizer=".", verify=False).choosing_texts == texts
    traced = fresh_trace("llama", task=CACHED)
    report = export_onnx(traced, tmp_path / "onnx", quantize="int4", texts=texts, tokenizer=tiny_tokenizer())
    assert report.quality is not None
    assert report.quantization is not None
    assert (report.quality.inputs, report.quantization.chosen_by) == ("2 given texts", "2 of the given texts")


def test_texts_too_short_to_choose_by_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantize": "int4", "texts": ["a", "b", "c"], "tokenizer": tiny_tokenizer()}
    with pytest.raises(
        ExportError, match=r"has too few tokens \(2\) in the texts that choose bits.*texts with 16 at least"
    ):
        export_onnx(fresh_trace("llama", task=CACHED), tmp_path / "onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_stored_bits_are_those_of_the_file(tmp_path: Path) -> None:
    layer = nn.Linear(96, 32, bias=False)
    report = export_onnx(trace(layer, (torch.randn(2, 96),)), tmp_path / "onnx", quantize="int4")
    tensors = [value.const_value for value in ir.load(tmp_path / "onnx" / "model.onnx").graph.initializers.values()]
    stored = sum(tensor.nbytes for tensor in tensors if tensor is not None and len(tensor.shape) > 1)
    assert report.quantization is not None
    assert report.quantization.stored_bits == 8 * stored / (96 * 32)
    assert dataclasses.replace(report.quantization, stored_bits=None).bits == 4


@pytest.mark.parametrize("rounding", ["nearest", "searched"])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_half_the_bits_lose_nothing(bits: int, rounding: Any) -> None:
    """Scales may have any magnitude: bfloat16 has float32's range, and rounding reads the scale as it is stored."""
    matrix = np.random.default_rng(0).standard_normal((128, 24)).astype(np.float32)
    matrix *= np.logspace(-12, 12, 24, dtype=np.float32)
    matrix[:, 3] = 0
    errors = []
    for scale_bits in (16, 32):
        form = Blocks(bits, rounding=rounding, scale_bits=scale_bits)  # type: ignore[arg-type]
        blocks = quantize_blocks(matrix, form)
        if scale_bits == 16:
            assert np.array_equal(blocks.scales, blocks.scales.astype(ml_dtypes.bfloat16).astype(np.float32))
        change = dequantize_blocks(blocks, bits, 128) - matrix.T
        errors.append(np.linalg.norm(change, axis=1) / np.maximum(np.linalg.norm(matrix, axis=0), 1e-30))
    assert (errors[0] <= 1.2 * errors[1]).all()
    assert errors[0].mean() <= 1.05 * errors[1].mean()
    assert errors[0][3] == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_scales_are_widened_when_the_model_is_opened(precision: Any, tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED)
    export_onnx(traced, tmp_path / "onnx", quantize="int4", precision=precision, verify=False)
    graph = ir.load(tmp_path / "onnx" / "model.onnx").graph
    scales = {value.dtype for name, value in graph.initializers.items() if name.endswith("_scales")}
    casts = [node for node in graph if node.op_type == "Cast" and str(node.inputs[0].name).endswith("_scales")]  # type: ignore[union-attr]
    assert scales == {ir.DataType.BFLOAT16 if precision == "fp32" else ir.DataType.FLOAT16}
    assert bool(casts) == (precision == "fp32")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), options)
    opened = ir.load(tmp_path / "opened.onnx").graph
    products = [node for node in opened if node.op_type == "MatMulNBits"]
    assert products
    assert all(node.inputs[2].is_initializer() for node in products)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("mixtral", CACHED),
        ("albert", None),
        ("vit", None),
        ("t5", "text2text-generation-with-past"),
        ("whisper", "automatic-speech-recognition-with-past"),
    ],
)
def test_every_kind_of_model_is_run_to_choose(name: str, task: str | None, tmp_path: Path) -> None:
    report = export_onnx(fresh_trace(name, task=task), tmp_path / "onnx", quantize="int4", bits=6, block_size=16)
    assert report.quantization is not None
    assert report.quantization.chosen_by in ("random inputs", "16 texts of 31 tokens that the model drew")
    assert report.quantization.layers
    assert report.quantization.bits is not None
    assert report.quantization.bits <= 6
    assert report.verification is not None
    assert report.verification.passed
