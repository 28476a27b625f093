"""Decoders whose heads have sizes that ONNX Runtime's fused attention refuses run as plain operators, and say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

CACHED = "text-generation-with-past"


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("qwen3", {"head_dim": 12}, {}),
        ("llama", {"head_dim": 20, "num_key_value_heads": 1}, {"precision": "fp16"}),
        ("llama", {"head_dim": 4, "num_hidden_layers": 1}, {"quantize": "int4", "block_size": 16}),
    ],
    ids=str,
)
def test_other_sizes_than_multiples_of_eight_are_plain(
    name: str, sizes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(name, **sizes)
    report = export_onnx(trace(model, task=CACHED), tmp_path / "onnx", **options)
    reason = f"its head size is {sizes['head_dim']}, and the operator supports multiples of 8"
    layers = {f"model.layers.{index}.self_attn": reason for index in range(model.config.num_hidden_layers)}
    assert report.attention is not None
    assert (report.attention.fused, report.attention.plain) == (0, layers)
    assert json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["attention"]["plain"] == layers
    assert report.verification is not None
    assert report.verification.passed


def test_an_export_that_is_not_verified_runs_and_generates(tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=12)
    export_onnx(trace(model, task=CACHED), tmp_path / "onnx", verify=False)
    onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    prompt = torch.tensor([[5, 17, 3, 41]])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    tokens = load(tmp_path / "onnx").generate(prompt.tolist(), max_new_tokens=8)
    assert tokens == [expected[0, 4:].tolist()]


@pytest.mark.parametrize("size", [8, 24])
def test_multiples_of_eight_are_fused(size: int, tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=size, num_hidden_layers=1)
    report = export_onnx(trace(model, task=CACHED), tmp_path / "onnx", verify=False)
    onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert report.attention is not None
    assert (report.attention.fused, report.attention.plain) == (1, {})
