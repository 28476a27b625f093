"""An adapter folded into an exported model: the files of an export of the merged model, without the model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import text_batch, tiny_model
from tiny_tokenizers import tiny_tokenizer
from torch import nn
from traces import fresh_trace
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, TracedModel, rewrite, trace
from gralora_fx.adapters.adapter_files import adapter_digest, read_adapter, tensors_digest
from gralora_fx.errors import CheckpointError, ExportError, MergeError
from gralora_fx.exporters import FoldReport, export_onnx, fold_onnx, verify_onnx
from gralora_fx.exporters.folding import data_files
from gralora_fx.exporters.folding.data_files import Change, copy_changed
from gralora_fx.progress.silence import quiet
from gralora_fx.runtime.manifest import read_manifest
from gralora_fx.serving import load

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CACHED = "text-generation-with-past"


def gralora(targets: Any, **options: Any) -> GraloraConfig:
    """A configuration of a random adapter."""
    return GraloraConfig(**{"r": 4, "alpha": 8, "target_modules": targets, "init_weights": False, **options})


def adapted(traced: TracedModel, config: Any) -> GraloraModel:
    """A model with a small random adapter."""
    torch.manual_seed(3)
    model = rewrite(traced, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "gralora." in name:
                parameter.mul_(0.3)
    return model


class Case:
    """A base export, an adapter beside it, and the export of the adapted model."""

    def __init__(self, root: Path, traced: TracedModel, config: Any, **options: Any) -> None:
        self.base, self.adapter, self.fresh, self.out = (root / name for name in ("base", "adapter", "fresh", "out"))
        export_onnx(traced, self.base, verify=False, **options)
        self.model = adapted(traced, config)
        self.model.save_pretrained(self.adapter)
        self.options = options

    def export_fresh(self) -> Path:
        export_onnx(self.model, self.fresh, verify=False, **self.options)
        return self.fresh

    def fold(self, **options: Any) -> FoldReport:
        return fold_onnx(self.base, self.adapter, self.out, **options)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every initializer of a directory's models, by file and name."""
    models = {path.name: ir.load(path) for path in sorted(directory.glob("*.onnx"))}
    return {
        f"{file}:{name}": value.const_value.numpy().copy()  # type: ignore[union-attr]
        for file, model in models.items()
        for name, value in model.graph.initializers.items()
    }


def assert_same_weights(directory: Path, expected: Path, tolerance: float = 1e-6) -> None:
    ours, theirs = tensors(directory), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        scale = max(1.0, float(np.abs(values.astype(np.float64)).max(initial=0)))
        difference = np.abs(ours[name].astype(np.float64) - values.astype(np.float64)).max(initial=0)
        assert difference <= tolerance * scale, name


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- our own exports ---------------------------------------------------------------------------------------------------

CASES = {
    "llama": (CACHED, PROJECTIONS),
    "gpt2": (CACHED, ["c_attn", "c_proj", "c_fc"]),
    "bert": ("text-classification", ["query", "key", "value", "dense"]),
    "albert": ("text-classification", ["query", "value", "ffn"]),
    "t5": ("text2text-generation-with-past", ["q", "k", "v", "o", "wi", "wo"]),
    "vit": (None, ["q_proj", "v_proj", "fc1", "fc2"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_is_an_export_of_the_merged_model(name: str, tmp_path: Path) -> None:
    """Transposed, packed, in one file or two, and a layer that is called by several others."""
    task, targets = CASES[name]
    case = Case(tmp_path, fresh_trace(name, task=task), gralora(targets, hybrid_r=2, fan_in_fan_out=name == "gpt2"))
    before = digests(case.base)
    report = case.fold()
    assert digests(case.base) == before
    assert {site.path for site in report.sites} == {p.site.path for p in case.model.plans["default"].selected}
    assert {site.how for site in report.sites} == {"as recorded"}
    assert_same_weights(case.out, case.export_fresh())
    assert verify_onnx(case.out, case.model, "quick").passed
    folded, fresh = read_manifest(case.out), read_manifest(case.fresh)
    assert folded.verification is None
    assert {name: entry.sha256 for name, entry in folded.adapters.items()} == {
        name: entry.sha256 for name, entry in fresh.adapters.items()
    }
    assert (folded.base_fingerprint, folded.sites, folded.weights) == (
        fresh.base_fingerprint,
        fresh.sites,
        fresh.weights,
    )
    load(case.out, check=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_half_precision_is_rounded_once(name: str, precision: str, tmp_path: Path) -> None:
    """Of the stored base and the update: beside a fold of the float weights that is one rounding more at most."""
    task, targets = CASES[name]
    case = Case(tmp_path, fresh_trace(name, task=task), gralora(targets), precision=precision)
    case.fold()
    assert_same_weights(case.out, case.export_fresh(), 2.0 ** (-10 if precision == "fp16" else -7))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, use_rslora=True),
        LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            rank_pattern={"q_proj": 2},
            alpha_pattern={r"layers\.1\..*": 4},
        ),
        gralora(["k_proj", "up_proj"], gralora_k=4, r=8),
    ],
    ids=["lora", "rslora", "patterns", "gralora"],
)
def test_every_method_folds(config: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), config)
    case.fold()
    assert_same_weights(case.out, case.export_fresh())


def test_an_adapter_that_peft_saved(tmp_path: Path) -> None:
    """Merged by PEFT itself, and exported."""
    model = tiny_model("llama")
    export_onnx(trace(model, task=CACHED), tmp_path / "base", verify=False)
    torch.manual_seed(0)
    config = peft.GraloraConfig(r=4, alpha=2, target_modules=PROJECTIONS, init_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    export_onnx(trace(wrapped.merge_and_unload(), task=CACHED), tmp_path / "fresh", verify=False)
    assert_same_weights(tmp_path / "out", tmp_path / "fresh")


def test_a_second_adapter_is_folded_on_top_and_both_are_recorded(tmp_path: Path) -> None:
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), gralora(["q_proj", "gate_proj"]))
    case.fold()
    model = case.model
    model.add_adapter("second", gralora(["v_proj", "gate_proj"], r=2, gralora_k=1))
    model.save_pretrained(tmp_path, ["second"])
    model.set_adapter(["default", "second"])
    report = fold_onnx(case.out, tmp_path / "second", tmp_path / "both")
    assert report.adapter_name == "default_2"
    assert list(read_manifest(tmp_path / "both").adapters) == ["default", "default_2"]
    export_onnx(model, tmp_path / "fresh", verify=False)
    assert_same_weights(tmp_path / "both", tmp_path / "fresh")
    assert verify_onnx(tmp_path / "both", model, "quick").passed


def test_rows_are_changed_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that end within a block of the adapter, and within a packed matrix."""
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), gralora(PROJECTIONS, gralora_k=4))
    monkeypatch.setattr(data_files, "_AT_ONCE", 1300)
    case.fold()
    assert_same_weights(case.out, case.export_fresh())
    load(case.out, check=True)


# -- heads that are tied to an embedding -------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "int4", "int8-dynamic"])
def test_a_tied_head_gets_a_weight_of_its_own(quantize: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    case = Case(tmp_path, trace(model, task=CACHED), gralora(["lm_head", "q_proj"], gralora_k=1), quantize=quantize)
    extra = {"requantize": True, "base": tmp_path / "model"} if quantize else {}
    report = case.fold(**extra)
    before, after = tensors(case.base), tensors(case.out)
    if quantize != "int8-dynamic":  # whose head is stored apart
        (name,) = after.keys() - before.keys() if quantize is None else [min(after.keys() - before.keys())]
        assert name.startswith("model.onnx:lm_head.weight")
        assert {site.initializer for site in report.sites if site.path == "lm_head"} == {name.partition(":")[2]}
    for name, values in before.items():
        if "embed_tokens" in name and not name.endswith(("_quantized", "_scale")):
            assert np.array_equal(after[name], values), name
    if quantize is None:
        assert verify_onnx(case.out, case.model, "quick").passed
    load(case.out, check=True)
    again = fold_onnx(
        case.out, case.adapter, tmp_path / "again", **({"requantize": True, "force": True} if extra else {})
    )
    assert tensors(tmp_path / "again").keys() == after.keys()
    assert {site.initializer for site in again.sites} == {site.initializer for site in report.sites}


def test_layers_that_share_a_weight_are_refused_by_name(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.three(self.two(self.one(x)))

    traced = trace(Shared().eval(), (torch.randn(2, 8),))
    case = Case(tmp_path, traced, gralora(["one", "three"]))
    with pytest.raises(MergeError, match=r"one: one.weight is the weight of two too, which would change with it"):
        case.fold()
    assert not case.out.exists()


def test_a_weight_that_no_layer_owns(tmp_path: Path) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.kernel = nn.Parameter(torch.randn(6, 8))
            self.inner.forward = lambda x: nn.functional.linear(x, self.inner.kernel)  # type: ignore[assignment]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    traced = trace(Functional().eval(), (torch.randn(2, 8),))
    (site,) = traced.sites
    assert site.kind == "functional"
    case = Case(tmp_path, traced, gralora([site.path], gralora_k=2))
    case.fold()
    assert_same_weights(case.out, case.export_fresh())


# -- quantized weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["int4", "int8", "int8-dynamic"])
def test_quantized_weights_are_refused_unless_asked_for(quantize: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), gralora(["q_proj", "down_proj"]), quantize=quantize)
    message = (
        r"_proj and 3 other layers are quantized.* fold before quantizing .*requantize=True \(--requantize\), best"
    )
    with pytest.raises(MergeError, match=message):
        case.fold()
    assert not case.out.exists()


@pytest.mark.parametrize("quantize", ["int4", "int8", "int8-dynamic"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_requantized_from_the_base_it_is_a_fresh_quantized_export(
    quantize: Any, precision: Any, tmp_path: Path
) -> None:
    if quantize == "int8-dynamic" and precision != "fp32":
        pytest.skip("int8-dynamic is float32 otherwise")
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    traced = trace(model, task=CACHED)
    case = Case(tmp_path, traced, gralora(PROJECTIONS), quantize=quantize, precision=precision)
    report = case.fold(requantize=True, base=tmp_path / "model")
    ours, theirs = tensors(case.out), tensors(case.export_fresh())
    for name, values in theirs.items():  # a value between two steps may go either way
        assert np.mean(ours[name] != values) <= 0.01 or np.allclose(ours[name], values, rtol=1e-3), name
    assert report.survival is not None
    assert 0.9 < report.survival < 1.1
    assert all(site.survival is not None and 0.5 < site.survival < 1.5 for site in report.sites)
    load(case.out, check=True)


@pytest.mark.parametrize("quantize", ["int4", "int8-dynamic"])
def test_an_update_that_rounding_takes_away_is_refused_unless_forced(quantize: Any, tmp_path: Path) -> None:
    """Dequantized weights are on the grid, to which they return after a small update."""
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["q_proj", "down_proj"], alpha=0.004), quantize=quantize)
    with pytest.raises(
        MergeError, match=r"rounding leaves -?\d+ % of the update, and half or less of it at 4 of 4 layers"
    ):
        case.fold(requantize=True)
    assert not case.out.exists()
    report = case.fold(requantize=True, force=True)
    assert report.survival is not None
    assert report.survival < 0.5
    assert "% of the update" in str(report)


def test_layers_without_an_update_keep_their_blocks_bit_for_bit(tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["k_proj"], gralora_k=2, alpha=200), quantize="int4", block_size=16)
    case.fold(requantize=True, force=True)
    before, after = tensors(case.base), tensors(case.out)
    name = "model.onnx:model.layers.0.self_attn.q_proj+k_proj+v_proj.weight_Q4"
    changed = np.any(before[name] != after[name], axis=(1, 2))
    assert not changed[:32].any()
    assert changed[32:48].any()
    assert not changed[48:].any()


def test_the_share_that_survives_is_the_projection_on_the_update(tmp_path: Path) -> None:
    model = tiny_model("llama")
    case = Case(tmp_path, trace(model, task=CACHED), gralora(["o_proj"], alpha=40), quantize="int8")
    report = case.fold(requantize=True, force=True)
    site = report.sites[0]
    float_case = tmp_path / "float"
    export_onnx(trace(model, task=CACHED), float_case, verify=False)
    fold_onnx(float_case, case.adapter, tmp_path / "float_folded")
    name = "model.onnx:model.layers.0.self_attn.o_proj.weight"
    update = tensors(tmp_path / "float_folded")[name] - tensors(float_case)[name]  # [in, out]

    def dequantized(directory: Path) -> np.ndarray:
        found = tensors(directory)
        values, scales = found[f"{name}_Q8"].astype(np.float32) - 128, found[f"{name}_scales"]
        return (values * scales[..., None]).reshape(32, 32).T

    change = dequantized(case.out) - dequantized(case.base)
    assert site.survival == pytest.approx(float((change * update).sum() / (update * update).sum()), rel=1e-3)


# -- parameters that are replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}])
def test_saved_modules_and_biases_are_written(options: Any, tmp_path: Path) -> None:
    config = gralora(["query", "dense"], modules_to_save=["classifier"], bias="all")
    case = Case(tmp_path, fresh_trace("bert", task="text-classification"), config)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    case.model.save_pretrained(case.adapter)
    report = case.fold()
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.bias"} <= set(report.replaced)
    assert_same_weights(case.out, case.export_fresh())
    assert verify_onnx(case.out, case.model, "quick").passed


def test_a_trained_embedding_leaves_the_tied_head_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    config = gralora(["q_proj"], modules_to_save=["embed_tokens"])
    case = Case(tmp_path, trace(model, task=CACHED), config)
    trained = load_file(case.adapter / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.weight"
    trained[key] = trained[key] + 1
    save_file(trained, case.adapter / "adapter_model.safetensors")
    case.fold()
    before, after = tensors(case.base), tensors(case.out)
    name = "model.onnx:model.embed_tokens.weight"
    assert np.array_equal(before[name], after[name])
    assert np.array_equal(after[f"{name}_trained"], trained[key].numpy())


def test_parameters_that_the_export_does_not_name_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, fresh_trace("bert", task="text-classification"), gralora(["query"], bias="all"))
    tensors_of = load_file(case.adapter / "adapter_model.safetensors")
    tensors_of["base_model.model.bert.nowhere.bias"] = torch.zeros(3)
    tensors_of["base_model.model.bert.embeddings.LayerNorm.weight"] = torch.full((32,), 7.0)
    save_file(tensors_of, case.adapter / "adapter_model.safetensors")
    with pytest.raises(MergeError) as caught:
        case.fold()
    assert "bert.nowhere.bias: no initializer of the export has its name" in str(caught.value)
    assert "LayerNorm.weight: the adapter holds values for it that are not the export's" in str(caught.value)


# -- other exporters' models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, its exports by onnxruntime-genai's builder and by transformers, and an adapter that PEFT saved."""
    root = tmp_path_factory.mktemp("foreign")
    model = tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=96)
    model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    for precision in ("fp32", "int4"):
        arguments = ["-m", root / "model", "-o", root / precision, "-p", precision, "-e", "cpu", "-c", root / "cache"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = OnnxExporter().export(model, text_batch(), OnnxConfig(dynamic=True))
        exported.save_pretrained(root / "transformers")
    torch.manual_seed(5)
    config = peft.GraloraConfig(r=4, alpha=4, target_modules=[*PROJECTIONS, "lm_head"], gralora_k=1, init_weights=False)
    wrapped = peft.get_peft_model(tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=96), config)
    wrapped.save_pretrained(root / "adapter")
    wrapped.merge_and_unload().save_pretrained(root / "merged")
    return root


def genai_logits(directory: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    feed: dict[str, Any] = {}
    ids = np.array([[5, 9, 33, 71, 8]])
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            feed[entry.name] = np.zeros((1, 2, 0, 16), np.float32)
        else:
            feed[entry.name] = ids if entry.name == "input_ids" else np.ones_like(ids)
    result: np.ndarray = session.run(["logits"], feed)[0]
    return result


@pytest.mark.parametrize("with_base", [False, True])
def test_genais_builder(foreign: Path, tmp_path: Path, with_base: bool) -> None:
    """Queries, keys and values are one initializer there."""
    base = foreign / "model" if with_base else None
    report = fold_onnx(foreign / "fp32", foreign / "adapter", tmp_path / "out", base=base)
    assert {site.how for site in report.sites} == {"by name"}
    assert not (tmp_path / "out" / "gralora_export.json").exists()
    assert (tmp_path / "out" / "genai_config.json").is_file()
    expected = AutoModelForCausalLM.from_pretrained(foreign / "merged")
    with torch.no_grad():
        logits = expected(torch.tensor([[5, 9, 33, 71, 8]])).logits.numpy()
    ours = genai_logits(tmp_path / "out")
    assert np.abs(ours - logits).max() <= 1e-5 * max(1, np.abs(logits).max())


def test_names_that_say_nothing_are_found_by_value(foreign: Path, tmp_path: Path) -> None:
    model = ir.load(foreign / "fp32" / "model.onnx")
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"onnx::MatMul_{index}"
    (tmp_path / "renamed").mkdir()
    ir.save(model, tmp_path / "renamed" / "model.onnx", external_data="weights.bin")
    fold_onnx(foreign / "fp32", foreign / "adapter", tmp_path / "named")
    with pytest.raises(
        MergeError, match=r"q_proj: no initializer .* or holds its values; give base \(--base\), the base"
    ):
        fold_onnx(tmp_path / "renamed", foreign / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = fold_onnx(tmp_path / "renamed", foreign / "adapter", tmp_path / "out", base=foreign / "model")
    assert {site.how for site in report.sites} == {"by value"}
    by_value = list(tensors(tmp_path / "out").values())
    by_name = list(tensors(tmp_path / "named").values())
    assert all(np.array_equal(one, other) for one, other in zip(by_value, by_name, strict=True))


def test_a_quantized_model_of_genais_builder(foreign: Path, tmp_path: Path) -> None:
    report = fold_onnx(foreign / "int4", foreign / "adapter", tmp_path / "out", base=foreign / "model", requantize=True)
    assert report.survival is not None
    assert 0.9 < report.survival < 1.1
    arguments = ["-m", foreign / "merged", "-o", tmp_path / "int4", "-p", "int4", "-e", "cpu", "-c", tmp_path / "cache"]
    tiny_tokenizer().save_pretrained(foreign / "merged")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "int4")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert np.mean(ours[name] != values) <= 0.01 or np.allclose(ours[name], values, rtol=1e-4), name


@pytest.mark.parametrize("with_base", [False, True])
def test_transformers_exporter(foreign: Path, tmp_path: Path, with_base: bool) -> None:
    """Transposed weights are `val_74` there, and their metadata says of what they were folded."""
    base = foreign / "model" if with_base else None
    report = fold_onnx(foreign / "transformers", foreign / "adapter", tmp_path / "out", base=base)
    assert {site.how for site in report.sites} == {"by name"}
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    batch = text_batch()
    feed = {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()}
    logits = session.run(None, feed)[0]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(foreign / "merged")(**batch).logits.numpy()
    real = batch["attention_mask"].bool().numpy()
    assert np.abs(logits - expected)[real].max() <= 1e-5 * max(1, np.abs(expected).max())


def test_another_base_is_told_by_its_values(foreign: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", seed=1, hidden_size=64, head_dim=16, intermediate_size=96)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MergeError, match=r"does not hold the weight of .*other; give the base that was exported"):
        fold_onnx(foreign / "fp32", foreign / "adapter", tmp_path / "out", base=tmp_path / "other")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small export and an adapter; tests copy what they change."""
    return Case(tmp_path_factory.mktemp("small"), fresh_trace("llama", task=CACHED), gralora(["q_proj", "down_proj"]))


def copied(case: Case, tmp_path: Path) -> Case:
    other = object.__new__(Case)
    other.model, other.options, other.out = case.model, case.options, tmp_path / "out"
    other.base, other.adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(case.base, other.base)
    shutil.copytree(case.adapter, other.adapter)
    return other


def edited_adapter(case: Case, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(case.adapter / "adapter_model.safetensors")
    edit(found)
    save_file(found, case.adapter / "adapter_model.safetensors")


def test_layers_that_the_export_lacks_are_all_named(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)

    def move(found: dict[str, torch.Tensor]) -> None:
        for key in list(found):
            if "layers.0" in key:
                found[key.replace("layers.0", "layers.9")] = found.pop(key)

    edited_adapter(case, move)
    with pytest.raises(MergeError) as caught:
        case.fold()
    assert "model.layers.9.self_attn.q_proj: the export has no such layer" in str(caught.value)
    assert "model.layers.9.mlp.down_proj: the export has no such layer" in str(caught.value)
    assert not case.out.exists()


def test_widths_of_another_base_are_told(small: Case, tmp_path: Path) -> None:
    wider = fresh_trace("llama", task=CACHED, hidden_size=64)
    adapted(wider, gralora(["q_proj"])).save_pretrained(tmp_path / "wider")
    with pytest.raises(
        MergeError, match=r"adapter is for 64 inputs and 32 outputs, but .* has 32 and 32; give an adapter"
    ):
        fold_onnx(small.base, tmp_path / "wider", tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.popitem(), "missing base_model.model.model.layers"),
        (lambda t: t.update({next(iter(t)): torch.full_like(t[next(iter(t))], float("nan"))}), "are not finite"),
        (lambda t: t.update({next(iter(t)): t[next(iter(t))][..., :1].contiguous()}), "has shape"),
        (lambda t: t.clear(), "it holds no tensor of GraLoRA"),
    ],
)
def test_a_damaged_adapter(edit: Any, message: str, small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)
    edited_adapter(case, edit)
    with pytest.raises(CheckpointError, match=message):
        case.fold()
    assert not case.out.exists()


def test_a_result_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["down_proj"], alpha=1e9), precision="fp16")
    with pytest.raises(
        MergeError, match=r"folded weight of .*down_proj is not finite in float16; .* nothing was written"
    ):
        case.fold()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_earlier_adapter_of_another_base(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)

    def name_base(base: str) -> None:
        config = json.loads((case.adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (case.adapter / "adapter_config.json").write_text(json.dumps(config))

    name_base("hub/one")
    case.fold()
    name_base("hub/other")
    with pytest.raises(
        MergeError, match=r"an adapter of hub/other, but the export has the adapter 'default' of hub/one"
    ):
        fold_onnx(case.out, case.adapter, tmp_path / "second")
    fold_onnx(case.out, case.adapter, tmp_path / "second", force=True)


def test_an_output_that_may_not_be_written(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)
    before = digests(case.base)
    for output in (case.base, case.base / "within", tmp_path):
        with pytest.raises(ExportError):
            fold_onnx(case.base, case.adapter, output)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(ExportError, match=r"is not empty and holds no gralora_export\.json"):
        fold_onnx(case.base, case.adapter, tmp_path / "notes")
    assert digests(case.base) == before
    case.fold()
    case.fold()  # over an earlier one of the same base
    manifest = json.loads((case.out / "gralora_export.json").read_text())
    manifest["task"] = "another"
    (case.out / "gralora_export.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="holds an export for the task another"):
        case.fold()
    case.fold(overwrite=True)


def test_damaged_exports(small: Case, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"holds no ONNX model \(\*.onnx\); give the directory of an export"):
        fold_onnx(small.adapter, small.adapter, tmp_path / "out")
    case = copied(small, tmp_path)
    data = case.base / "model.onnx_data"
    content = data.read_bytes()
    data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ExportError, match=r"model.onnx_data has another SHA-256 than the manifest says"):
        case.fold()
    data.write_bytes(content[:-5000])
    with pytest.raises(ExportError, match=r"model.onnx_data has [\d,]+ bytes instead of"):
        case.fold()
    (case.base / "gralora_export.json").unlink()
    with pytest.raises(ExportError, match=r"it is damaged, so copy or export it again"):
        case.fold()
    data.unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    for link in (os.link, os.symlink):
        link(tmp_path / "elsewhere", data)
        with pytest.raises(ExportError, match="is a link; copy the file itself"):
            case.fold()
        data.unlink()
    (case.base / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="is not an ONNX model"):
        case.fold()
    assert not case.out.exists()


def test_an_older_manifest_is_searched_by_name(small: Case, tmp_path: Path) -> None:
    case = copied(small, tmp_path)
    manifest = json.loads((case.base / "gralora_export.json").read_text())
    del manifest["weights"]
    (case.base / "gralora_export.json").write_text(json.dumps(manifest))
    report = case.fold()
    assert {site.how for site in report.sites} == {"by name"}
    assert read_manifest(case.out).weights is None
    small.fold(overwrite=True)
    assert_same_weights(case.out, small.out, 0)


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom(20_000_000)
    (tmp_path / "one").write_bytes(content)

    def invert(part: torch.Tensor, first: int) -> None:
        part.bitwise_not_()

    digest = copy_changed(
        tmp_path / "one",
        tmp_path / "other",
        [Change(100, 9_000_000, 1000, invert), Change(9_000_100, 50, 50, invert), Change(7, 70, 7, invert, 20_004_864)],
    )
    written = (tmp_path / "other").read_bytes()
    flipped = bytes(255 - byte for byte in content[100:9_000_150])
    assert written[:20_000_000] == content[:100] + flipped + content[9_000_150:]
    assert written[20_000_000:] == bytes(4864) + bytes(255 - byte for byte in content[7:77])
    assert digest == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_digest_of_an_adapter_is_that_of_what_we_would_save(dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_model("llama"), config).to(dtype).save_pretrained(tmp_path)
    read, found = read_adapter(tmp_path)
    expected = tensors_digest({key: tensor.float() for key, tensor in found.items()}, read)
    assert adapter_digest(tmp_path / "adapter_model.safetensors", found, read) == expected


def test_folding_needs_neither_a_model_nor_an_exporter(small: Case, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gralora_fx.exporters import fold_onnx\n"
        f"fold_onnx({str(small.base)!r}, {str(small.adapter)!r}, {str(tmp_path / 'out')!r})\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('onnxscript', 'transformers', 'peft') or "
        "n.startswith(('torch.onnx', 'gralora_fx.tracing.trace', 'gralora_fx.model'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
