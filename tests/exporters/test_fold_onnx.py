"""An adapter folded into an exported model: the files of an export of the merged model, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import peft
import pytest
import torch
from fold_cases import CACHED, PROJECTIONS, Case, assert_same_weights, digests, gralora, tensors
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn
from traces import fresh_trace

from gralora_fx import LoraConfig, merge, trace
from gralora_fx.base.sources import rewriting
from gralora_fx.errors import CheckpointError, MergeError
from gralora_fx.exporters import export_onnx, fold_onnx, verify_onnx
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.format.manifest import read_manifest
from gralora_fx.serving import load

FILES = ("model.onnx", "model_rows.onnx")

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
    """The sum of stored base and update is rounded once: one rounding more at most than a fold of float weights."""
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


@pytest.mark.quick
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
    monkeypatch.setattr(rewriting, "BLOCK", 325)
    case.fold()
    assert_same_weights(case.out, case.export_fresh())
    load(case.out, check=True)


# -- heads that are tied to an embedding -------------------------------------------------------------------------------


def stored(file: Path, name: str) -> tuple[str, ...]:
    """Return where an initializer's bytes are."""
    model = onnx.load(file, load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return tuple(entry.value for entry in tensor.external_data)


@pytest.mark.parametrize("quantize", [None, "int4", "int8-dynamic"])
def test_a_tied_head_gets_a_weight_of_its_own(quantize: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    case = Case(tmp_path, trace(model, task=CACHED), gralora(["lm_head", "q_proj"], gralora_k=1), quantize=quantize)
    extra = {"requantize": True, "base": tmp_path / "model"} if quantize else {}
    report = case.fold(**extra)
    before, after = tensors(case.base), tensors(case.out)
    added = sorted(after.keys() - before.keys())
    name, of_rows = (next(name for name in added if name.startswith(f"{file}:")) for file in FILES)
    assert name.startswith("model.onnx:lm_head.weight")
    assert of_rows.partition(":")[2] == name.partition(":")[2]  # and both graphs read the same bytes
    assert len({stored(case.out / file, name.partition(":")[2]) for file in FILES}) == 1
    assert {site.initializer for site in report.sites if site.path == "lm_head"} == {name.partition(":")[2]}
    if quantize == "int4":
        endings = ("_Q4", "_scales", "_zero_points")
        parts = {f"{file}:lm_head.weight{ending}" for file in FILES for ending in endings}
        with mock.patch.object(ExportOptions, "format", Blocks(4, scale_bits=16)):  # to the nearest, as a fold rounds
            export_onnx(merge(case.model, untie=True), case.fresh, quantize="int4", bits=4, verify=False)
        fresh = tensors(case.fresh)
        assert after.keys() - before.keys() == parts
        assert all(np.mean(~np.isclose(after[part], fresh[part], rtol=1e-6, atol=0)) <= 0.01 for part in parts)
        logits = [np.asarray(load(path)(input_ids=[[5, 9, 33, 71]]).logits) for path in (case.out, case.fresh)]
        assert np.abs(logits[0] - logits[1]).max() <= 0.2 * np.abs(logits[1]).max()  # whose embedding is float
    for name, values in before.items():
        if "embed_tokens" in name:
            assert np.array_equal(after[name], values), name
    if quantize is None:
        assert verify_onnx(case.out, case.model, "quick").passed
    load(case.out, check=True)
    again = fold_onnx(case.out, case.adapter, tmp_path / "again", requantize=bool(extra), force=True)  # it is there
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


class UnreadHead(nn.Module):
    """A layer that is called, but on which no output depends, as the pooling of a vision model's features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unread = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.inner(x))
        self.unread(y)
        return y


def test_a_layer_on_which_no_output_depends_is_left_out(tmp_path: Path) -> None:
    x = torch.randn(2, 16)
    case = Case(tmp_path, trace(UnreadHead().eval(), (x,)), gralora("all-linear", bias="all"))
    report = case.fold()
    assert report.unread == ("unread",)
    assert "left out unread, on which no output depends" in report.details
    assert {site.path for site in report.sites} == {"inner"}
    assert "unread.bias" not in report.replaced
    expected = case.model(x)
    assert torch.allclose(load(case.out)(x=x)[0], expected, atol=1e-5)
    export_onnx(case.model, tmp_path / "data", adapters="data")
    assert torch.allclose(load(tmp_path / "data")(x=x, adapter="default")[0], expected, atol=1e-5)


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
    save_file(tensors_of, case.adapter / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"bert\.nowhere\.bias: no initializer of the export has its name"):
        case.fold()
    tensors_of["base_model.model.bert.embeddings.LayerNorm.weight"] = torch.full((32,), 7.0)
    save_file(tensors_of, case.adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected base_model\.model\.bert\.embeddings\.LayerNorm\.weight"):
        case.fold()
