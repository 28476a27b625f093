"""Experts whose model loops over those that are hit compute the same as one operator, and their model is traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from traces import relative_error

from gralora_fx import trace
from gralora_fx.core.tracing.inputs.cached_steps import cached_inputs
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.exporters import export_onnx
from gralora_fx.features.experts.interface import looped_experts_as_operators
from gralora_fx.features.experts.operators import Experts
from gralora_fx.features.experts.recognised import LOOPS
from tests.architectures.tiny_decoders import tiny_decoder

MODELS = {"DbrxForCausalLM": "DbrxExperts", "LongcatFlashForCausalLM": "LongcatFlashExperts"}


def routed(experts: Any, tokens: int = 24) -> tuple[torch.Tensor, ...]:
    """Tokens with two of all experts each, and weights that do not add up to one."""
    generator = torch.Generator().manual_seed(5)
    total = getattr(experts, "total_experts", None) or experts.num_experts
    index = torch.stack([torch.randperm(total, generator=generator)[:2] for _ in range(tokens)])
    x, weights = torch.randn(1, tokens, 32, generator=generator), torch.rand(tokens, 2, generator=generator)
    return (x if "Dbrx" in type(experts).__name__ else x[0]), index, weights


@pytest.mark.quick
@pytest.mark.parametrize(("name", "kind"), MODELS.items())
def test_the_operator_computes_what_the_loop_does(name: str, kind: str) -> None:
    model = tiny_decoder(name)
    experts = next(part for part in model.modules() if type(part).__name__ == kind)
    inputs = routed(experts)
    with torch.no_grad():
        expected = experts(*inputs)
        with looped_experts_as_operators(model, LOOPS):
            actual = experts(*inputs)
        assert experts(*inputs).equal(expected)  # it is as before
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-6


def test_every_layer_is_one_operator_for_any_number_of_tokens() -> None:
    model = tiny_decoder("LongcatFlashForCausalLM", num_layers=1)
    traced = trace(model, task="text-generation-with-past")
    assert len(traced.graph_module.graph.find_nodes(op="call_function", target=Experts.target)) == 1
    inputs = cached_inputs(model, batch=3, past=0, length=11)
    with torch.no_grad():
        expected, actual = model(**own_inputs(inputs), use_cache=True), traced(**inputs)
    assert relative_error(actual.logits, expected.logits) < 1e-5


def test_a_router_that_casts_its_weight_stays_float_in_few_bits(tmp_path: Path) -> None:
    traced = trace(tiny_decoder("LongcatFlashForCausalLM", num_layers=1), task="text-generation-with-past")
    report = export_onnx(traced, tmp_path / "int8", quantize="int8")
    assert report.verification is not None
    assert report.verification.passed
