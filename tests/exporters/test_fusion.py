"""A decoder's layers on ONNX Runtime: norm, rotary embedding and attention become one operator each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from gralora_fx import GraloraConfig, merge, rewrite, trace
from gralora_fx.core.graph.pipeline import PassLog
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.operators.layers import RmsNorm, Rotary
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.kinds.decoder import decoder_models
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.rules.normalization import LowerNorms, match_rms_norms
from gralora_fx.exporters.rules.onnx_pipeline import import_domains
from gralora_fx.exporters.translation.simplify import simplify
from gralora_fx.exporters.translation.translate import translate


class Norm(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.weight, self.spelling = nn.Parameter(torch.randn(8)), spelling

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + y
        if self.spelling == "llama":
            return x + self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        if self.spelling == "gemma":
            return x + (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)) * (1.0 + self.weight)
        if self.spelling == "bare":
            return x + torch.rsqrt(1e-6 + torch.square(x).mean(-1, keepdim=True)) * x
        return x + nn.functional.layer_norm(x, (8,), self.weight, self.weight, 1e-6)


@pytest.mark.parametrize("spelling", ["llama", "gemma", "bare", "layer"])
def test_a_norm_and_the_addition_before_it_are_one_operator(spelling: str, tmp_path: Path) -> None:
    source, x, y = Norm(spelling), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    model = translate(trace(source, (x, y)).graph_module, match_rms_norms)
    assert LowerNorms()(model).changed == 1
    import_domains(model)
    ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (actual,) = session.run(None, {"x": x.numpy(), "y": y.numpy()})
    assert torch.allclose(torch.from_numpy(actual), source(x, y), atol=1e-5)
    operators = Counter(node.op_type for node in model.graph)
    assert operators["SkipLayerNormalization" if spelling == "layer" else "SkipSimplifiedLayerNormalization"] == 1
    assert operators["Add"] <= 2  # the residual behind it, and gemma's 1 + weight
    assert not operators["Sqrt"]


def test_a_norm_over_another_axis_or_of_another_power_stays() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
            return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)

    graph = copy_graph(trace(Other(), (torch.rand(2, 3, 8),)).graph_module)
    simplify(graph)
    assert match_rms_norms(graph).changed == 0


def test_the_operators_compute_what_they_stand_for() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    assert torch.allclose(RmsNorm(x, weight, 1e-6).result(), nn.functional.rms_norm(x, (8,), weight, 1e-6))
    heads, angles = torch.randn(2, 4, 3, 8), torch.rand(2, 3, 3)
    result = Rotary(heads, angles.cos(), angles.sin(), False).result()
    pairs = torch.complex(heads[..., :3], heads[..., 3:6]) * torch.polar(torch.ones(2, 1, 3, 3), angles[:, None])
    assert torch.allclose(result, torch.cat([pairs.real, pairs.imag, heads[..., 6:]], -1), atol=1e-6)
    pairs = torch.view_as_complex(heads[..., :6].reshape(2, 4, 3, 3, 2).contiguous())
    pairs = torch.view_as_real(pairs * torch.polar(torch.ones(2, 1, 3, 3), angles[:, None])).flatten(-2)
    result = Rotary(heads, angles.cos(), angles.sin(), True).result()
    assert torch.allclose(result, torch.cat([pairs, heads[..., 6:]], -1), atol=1e-6)


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 120,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 120, "bos_token_id": 1, "eos_token_id": 1}
# operators of two layers: products (those of one tensor and width are one), rotary embeddings, normalisations with
# their addition, and without
EXPECTED: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
    (
        LlamaConfig,
        SIZES,
        {"MatMul": 9, "Split": 2, "RotaryEmbedding": 2, "SkipSimplifiedLayerNormalization": 4, "Add": 0},
    ),
    (Qwen2Config, SIZES, {"MatMul": 9, "RotaryEmbedding": 2, "SkipSimplifiedLayerNormalization": 4, "Add": 2}),
    (Qwen3Config, {**SIZES, "head_dim": 16}, {"MatMul": 11, "RotaryEmbedding": 4, "RMSNormalization": 5}),
    (Gemma3TextConfig, {**SIZES, "head_dim": 16}, {"MatMul": 11, "RotaryEmbedding": 4, "Add": 0}),
    (Olmo2Config, SIZES, {"MatMul": 11, "RotaryEmbedding": 4}),
    (OlmoConfig, SIZES, {"GroupQueryAttention": 2, "LayerNormalization": 5}),  # no weight: its ones come from the sum
    (CohereConfig, SIZES, {"MatMul": 9, "RotaryEmbedding": 2}),
    (GlmConfig, {**SIZES, "head_dim": 16}, {"MatMul": 9, "RotaryEmbedding": 2}),
    (PhiConfig, {**SIZES, "partial_rotary_factor": 0.5}, {"RotaryEmbedding": 2, "LayerNormalization": 1}),
    (GPTNeoXConfig, SIZES, {"RotaryEmbedding": 4}),
    (GPT2Config, GPT2, {"MatMul": 9, "Slice": 1, "Reshape": 3, "SkipLayerNormalization": 5}),
    (OPTConfig, {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}, {"MatMul": 5, "SkipLayerNormalization": 1}),
]


@pytest.mark.parametrize(("config", "sizes", "expected"), EXPECTED, ids=lambda value: getattr(value, "__name__", ""))
def test_layers_become_the_operators_that_the_runtime_is_fast_at(
    config: Any, sizes: dict[str, Any], expected: dict[str, int]
) -> None:
    traced = trace(AutoModelForCausalLM.from_config(config(**sizes)).eval(), task="text-generation-with-past").eval()
    model = decoder_models(Conversion(traced, traced, ExportOptions(), PassLog()))["model"]
    operators = Counter(node.op_type for node in model.graph)
    assert operators["GroupQueryAttention"] == 2
    assert all(node.inputs[0].is_initializer() for node in model.graph if node.op_type == "Transpose")  # a tied head
    assert {name: operators[name] for name in expected} == expected


def test_a_merged_graph_has_the_operators_of_the_base_one_for_one() -> None:
    config = LlamaConfig(**SIZES)
    traced = trace(AutoModelForCausalLM.from_config(config).eval(), task="text-generation-with-past").eval()
    adapted = rewrite(traced, GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False))
    models = (traced, merge(adapted))
    graphs = [decoder_models(Conversion(model, model, ExportOptions(), PassLog()))["model"].graph for model in models]
    base, merged = ([(node.domain, node.op_type, len(node.inputs)) for node in graph] for graph in graphs)
    assert merged == base
