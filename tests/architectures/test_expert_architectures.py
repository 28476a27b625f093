"""Mixtures of experts of several architectures: one operator a layer, and the tokens of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

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


def _with_experts() -> list[str]:
    """Return the classes whose experts are operators by the documentation, as the survey of all decoders found."""
    pages = Path(__file__).parents[2] / "docs" / "decoders.md"
    return re.findall(r"^\| `(\w+)` .*\b\d MoE\b", pages.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", MIXTURES)
def test_linear_layers_and_experts_alone_are_quantized(tmp_path: Path, name: str) -> None:
    """Routers that multiply in float32 whatever the precision, as those of DeepSeek-V3 and Nemotron-H, stay float."""
    _check_few_bits(tiny_decoder(name, **MIXTURES[name]), tmp_path)


@pytest.mark.filterwarnings("ignore:.* differs in training:UserWarning")  # a router that draws random numbers there
@pytest.mark.parametrize("name", [name for name in _with_experts() if name not in MIXTURES])
def test_every_family_with_experts_is_exported_in_few_bits(tmp_path: Path, name: str) -> None:
    _check_few_bits(tiny_decoder(name), tmp_path)


def _check_few_bits(model: nn.Module, directory: Path) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # a router of zeros, to which all experts are alike
            nn.init.normal_(parameter, std=0.3)
    traced = trace(model, task="text-generation-with-past")
    for quantize in ("int8", "int4"):
        report = export_onnx(traced, directory / quantize, quantize=quantize)
        assert report.experts is not None
        assert report.experts.fused > 0
        assert report.verification is not None
        assert report.verification.passed
