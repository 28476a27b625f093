"""Adapters folded into models of PyTorch's older exporter, which Hugging Face optimum uses.

It folds the transpose of a linear layer's weight, whose name is `onnx::MatMul_123` then, stores equal tensors once, and
leaves what `Gemm` multiplies by, such as a head or a `Conv1D`, under its own name.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
from peft_oracle import peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gralora_fx.base.progress.stages import quiet
from gralora_fx.errors import MergeError
from gralora_fx.exporters import fold_onnx

IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(2))


class Layer(nn.Module):
    """Layers of each kind: two linear ones, and a square and a wide `Conv1D`."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.dense = nn.Linear(16, 16), nn.Linear(32, 16)
        self.c_attn, self.c_fc = Conv1D(16, 16), Conv1D(32, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.c_attn(torch.tanh(self.query(x)))
        result: Tensor = self.norm(x + self.dense(torch.tanh(self.c_fc(x))))
        return result


class Classifier(nn.Module):
    """An encoder of two layers with a head on the first token, and one on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head, self.classifier = nn.Linear(16, 20, bias=False), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x[:, 0]), self.lm_head(x)


def classifier() -> Any:
    torch.manual_seed(0)
    model = Classifier().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # else equal ones, which are stored once
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the model's export, and its checkpoint."""
    root, model = tmp_path_factory.mktemp("torchscript"), classifier()
    (root / "onnx").mkdir()
    (root / "base").mkdir()
    save_file(model.state_dict(), root / "base" / "model.safetensors")
    (root / "base" / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (IDS,), root / "onnx" / "model.onnx", input_names=["input_ids"], dynamic_axes=axes, dynamo=False
        )
    return root / "onnx", root / "base"


def adapter(directory: Path, **fields: Any) -> peft.PeftModel:
    """Return the model as PEFT adapts it, what trains moved, and its checkpoint."""
    wrapped = peft_model(classifier(), **{"r": 4, "gralora_k": 2, "alpha": 8, **fields})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in name or name.endswith("bias")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(directory))
    return wrapped


def outputs_of(directory: Path, ids: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    found: list[np.ndarray] = session.run(None, {"input_ids": ids.numpy()})
    return found


FIELDS: dict[str, Callable[[], dict[str, Any]]] = {
    "linear": lambda: {"target_modules": ["query", "dense"]},
    "conv1d": lambda: {"target_modules": ["query", "c_attn", "c_fc"], "fan_in_fan_out": True},
    "heads": lambda: {"target_modules": ["query"], "modules_to_save": ["lm_head", "classifier"]},
    "whole layers": lambda: {"target_modules": ["query"], "modules_to_save": ["dense", "c_attn", "c_fc"]},
    "biases": lambda: {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"},
}


@pytest.mark.parametrize("case", list(FIELDS))
def test_the_result_is_pefts(case: str, exported: tuple[Path, Path], tmp_path: Path) -> None:
    onnx_dir, base = exported
    names = {entry.name for entry in onnx.load(onnx_dir / "model.onnx").graph.initializer}
    assert any(name.startswith("onnx::MatMul_") for name in names)
    assert {"classifier.weight", "layers.0.c_attn.weight"} <= names
    wrapped = adapter(tmp_path / "adapter", **FIELDS[case]())
    report = fold_onnx(onnx_dir, tmp_path / "adapter", tmp_path / "out", base=base)
    assert "by value" in {site.how for site in report.sites}
    ids = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = [value.numpy() for value in wrapped(ids)]
    before = outputs_of(onnx_dir, ids)
    for ours, theirs, old in zip(outputs_of(tmp_path / "out", ids), expected, before, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
        assert np.abs(ours - old).max() > 1e-2


def test_without_the_base_each_layer_is_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", **FIELDS["heads"]())
    with pytest.raises(MergeError, match=r"layers\.0\.query: no initializer .*give base=\.\.\."):
        fold_onnx(exported[0], tmp_path / "adapter", tmp_path / "out")


def test_the_layout_of_a_square_matrix_is_not_guessed(exported: tuple[Path, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", target_modules=["c_fc"], modules_to_save=["c_attn"])
    with pytest.raises(MergeError, match=r"says whether layers\.0\.c_attn\.weight is stored transposed; give base"):
        fold_onnx(exported[0], tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Twins(nn.Module):
    """Two layers with equal weights that are not tied, as PyTorch's `TransformerEncoder` begins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x)))
        return result


@pytest.mark.parametrize("target", ["first", "last"])
@pytest.mark.parametrize("is_newer", [True, False])
def test_one_of_layers_with_equal_weights_gets_its_own_or_is_refused(
    target: str, is_newer: bool, tmp_path: Path
) -> None:
    model, x = Twins().eval(), torch.randn(2, 5, 16)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=is_newer, verbose=False)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    fold = {"base": tmp_path / "base", "output_dir": tmp_path / "out"}
    if not is_newer and target == "last":  # nothing in this exporter's file says which product is whose
        with pytest.raises(MergeError, match=r"last: onnx::MatMul_\d+ is the weight of first\.weight too"):
            fold_onnx(tmp_path / "model.onnx", tmp_path / "adapter", **fold)
        return
    report = fold_onnx(tmp_path / "model.onnx", tmp_path / "adapter", **fold)
    assert [site.initializer for site in report.sites] == [f"{target}.weight"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(actual - adapted(x).detach().numpy()).max() < 1e-5
