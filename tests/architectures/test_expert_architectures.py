"""Mixtures of experts of several architectures: one operator a layer, and the tokens of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from tests.architectures.tiny_decoders import tiny_decoder

# softmax after the choice, softmax before it, groups of sigmoids with a bias beside shared experts, squared ReLUs
MIXTURES: dict[str, dict[str, Any]] = {
    "GraniteMoeForCausalLM": {"num_hidden_layers": 1},
    "Qwen3MoeForCausalLM": {"num_hidden_layers": 1, "norm_topk_prob": True},
    "DeepseekV3ForCausalLM": {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    "NemotronHForCausalLM": {},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_one_operator_a_layer(tmp_path: Path, name: str) -> None:
    model = tiny_decoder(name, **MIXTURES[name])
    report = export_onnx(trace(model, task="text-generation-with-past"), tmp_path / "onnx")
    assert report.experts is not None
    assert (report.experts.fused, report.experts.plain) == (1, {})
    assert report.verification is not None
    assert report.verification.tokens is not None
    assert report.verification.tokens.agreement == 1
    assert report.verification.tensors[0].max_rel_error < 1e-4


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_linear_layers_and_experts_alone_are_quantized(tmp_path: Path, name: str, quantize: Any) -> None:
    """Routers that multiply in float32 whatever the precision, as those of DeepSeek-V3 and Nemotron-H, stay float."""
    model = tiny_decoder(name, **MIXTURES[name])
    traced = trace(model, task="text-generation-with-past")
    report = export_onnx(traced, tmp_path / "onnx", quantize=quantize)
    assert report.verification is not None
    assert report.verification.passed
