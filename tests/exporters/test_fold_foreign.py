"""Adapters folded into other exporters' models: onnxruntime-genai's builder and transformers' exporter."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import torch
from fold_cases import PROJECTIONS, tensors
from tiny_models import text_batch, tiny_model
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter

from gralora_fx.base.progress.stages import quiet
from gralora_fx.errors import MergeError
from gralora_fx.exporters import fold_onnx

ZERO_POINTS = ("is_symmetric=false",)
# name of the export: (its model, precision, options)
BUILDS = {
    "fp32": ("model", "fp32", ()),
    "int4": ("model", "int4", ()),
    "int4_zero_points": ("model", "int4", ZERO_POINTS),
    "merged_int4": ("merged", "int4", ()),
    "merged_int4_zero_points": ("merged", "int4", ZERO_POINTS),
}


def build(root: Path) -> None:
    """Export by onnxruntime-genai's builder, in this process, which has imported PyTorch already."""
    for name, (model, precision, options) in BUILDS.items():
        arguments = ["-m", root / model, "-o", root / name, "-p", precision, "-e", "cpu", "-c", root / "cache"]
        given = ["builder", *map(str, arguments), *(["--extra_options", *options] if options else [])]
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(sys, "argv", given)
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama, its exports by onnxruntime-genai's builder and by transformers, and PEFT's adapter."""
    root = tmp_path_factory.mktemp("foreign")
    model = tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=96)
    model.save_pretrained(root / "model")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = OnnxExporter().export(model, text_batch(), OnnxConfig(dynamic=True))
        exported.save_pretrained(root / "transformers")
    torch.manual_seed(5)
    config = peft.GraloraConfig(r=4, alpha=4, target_modules=[*PROJECTIONS, "lm_head"], gralora_k=1, init_weights=False)
    wrapped = peft.get_peft_model(tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=96), config)
    wrapped.save_pretrained(root / "adapter")
    wrapped.merge_and_unload().save_pretrained(root / "merged")
    for name in ("model", "merged"):
        tiny_tokenizer().save_pretrained(root / name)
    build(root)
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
    with pytest.raises(MergeError, match=r"q_proj: no initializer .* or holds its values; give base=\.\.\., the base"):
        fold_onnx(tmp_path / "renamed", foreign / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = fold_onnx(tmp_path / "renamed", foreign / "adapter", tmp_path / "out", base=foreign / "model")
    assert {site.how for site in report.sites} == {"by value"}
    by_value = list(tensors(tmp_path / "out").values())
    by_name = list(tensors(tmp_path / "named").values())
    assert all(np.array_equal(one, other) for one, other in zip(by_value, by_name, strict=True))


@pytest.mark.parametrize(("name", "options"), [("int4", ()), ("int4_zero_points", ZERO_POINTS)])
def test_a_quantized_model_of_genais_builder(
    name: str, options: tuple[str, ...], foreign: Path, tmp_path: Path
) -> None:
    report = fold_onnx(foreign / name, foreign / "adapter", tmp_path / "out", base=foreign / "model", requantize=True)
    assert report.survival is not None
    assert 0.9 < report.survival < 1.1
    ours, theirs = tensors(tmp_path / "out"), tensors(foreign / f"merged_{name}")
    assert ours.keys() == theirs.keys()
    assert any("zp" in key or "zero_points" in key for key in ours) == bool(options)
    for key, values in theirs.items():
        assert np.mean(ours[key] != values) <= 0.01 or np.allclose(ours[key], values, rtol=1e-4), key


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
