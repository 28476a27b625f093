"""Attention without a cache: one operator a layer, with every form of mask, in every kind of model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5EncoderModel,
)

from gralora_fx import trace
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.operators.attention import DotProductAttention
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.rules.attention.padding import split_mask
from gralora_fx.exporters.translation.simplify import simplify


def t5_encoder() -> PreTrainedModel:
    return T5EncoderModel(T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=37, vocab_size=101)).eval()


def swin() -> PreTrainedModel:
    sizes = {"depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=2, embed_dim=16, **sizes)).eval()


def llama_classifier() -> PreTrainedModel:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 101}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **heads, pad_token_id=0)).eval()


MODELS: dict[str, tuple[Any, str, int]] = {
    "bert": (lambda: tiny_model("bert"), "text-classification", 2),
    "mpnet": (lambda: tiny_model("mpnet"), "text-classification", 2),
    "t5 encoder": (t5_encoder, "feature-extraction", 2),
    "llama": (llama_classifier, "text-classification", 2),
    "clip text": (lambda: tiny_model("clip_text"), "feature-extraction", 2),
    "vit": (lambda: tiny_model("vit"), "image-classification", 2),
    "swin": (swin, "image-classification", 4),
}


def operators(directory: Path) -> Counter[str]:
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_one_operator(name: str, tmp_path: Path) -> None:
    make, task, layers = MODELS[name]
    report = export_onnx(trace(make(), task=task), tmp_path / "onnx")
    assert report.attention is not None
    assert (report.attention.fused, report.attention.plain) == (layers, {})
    counts = operators(tmp_path / "onnx")
    assert counts["Attention"] + counts["MultiHeadAttention"] == layers
    assert not counts["IsNaN"] + counts["Softmax"] + counts["SkipLayerNormalization"]


def test_the_mask_is_made_once(tmp_path: Path) -> None:
    for layers in (1, 3):
        traced = trace(tiny_model("bert", num_hidden_layers=layers), task="text-classification")
        export_onnx(traced, tmp_path / str(layers), verify=False, keep_padding=True)
    one, three = (operators(tmp_path / layers) for layers in ("1", "3"))
    for kind in ("Where", "Expand", "Cast", "Unsqueeze", "Shape", "Concat", "Transpose"):
        assert one[kind] == three[kind], kind


def test_half_precision(tmp_path: Path) -> None:
    report = export_onnx(trace(tiny_model("bert"), task="text-classification"), tmp_path / "onnx", precision="fp16")
    assert report.attention is not None
    assert report.attention.fused == 2
    report = export_onnx(trace(tiny_model("vit"), task="image-classification"), tmp_path / "bf16", precision="bf16")
    assert report.attention is not None
    assert [why for why in report.attention.plain.values() if "BFLOAT16" in why]


def test_what_is_not_fused_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}
    model = DebertaV2Model(DebertaV2Config(**sizes, **relative, vocab_size=101)).eval()
    report = export_onnx(trace(model, task="feature-extraction"), tmp_path / "onnx")
    skips = [skip for entry in report.passes if entry.name == "match_attention" for skip in entry.skipped]
    assert len(skips) == 1
    assert skips[0].place.startswith("encoder.layer.0.attention.self")
    assert report.attention is not None
    assert skips[0].place in report.attention.plain


def test_a_model_without_attention_reports_none(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    report = export_onnx(
        trace(ResNetForImageClassification(config).eval(), task="image-classification"), tmp_path / "r"
    )
    assert report.attention is None


def test_an_encoder_decoder_fuses_both_halves(tmp_path: Path) -> None:
    traced = trace(tiny_model("bart", encoder_layers=1, decoder_layers=1), task="text2text-generation-with-past")
    report = export_onnx(traced, tmp_path / "onnx")
    assert report.attention is not None
    assert report.attention.plain == {}
    assert report.attention.fused == 1 + 2  # the encoder's layer, and self and cross attention of the decoder's


class ByHand(nn.Module):
    """Attention of 2 heads in one spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (layer(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        hidden = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        if self.spelling == "divided":
            scores = query @ key.transpose(-1, -2) / 8**0.5 + hidden
        elif self.spelling == "bias first":
            scores = bias + 0.5 * torch.matmul(query, key.permute(0, 1, 3, 2)) + hidden
        elif self.spelling == "scaled query":
            scores = (query * 0.3) @ key.mT
            scores = torch.where(attention_mask[:, None, None, :].bool(), scores, torch.finfo(x.dtype).min)
        else:
            scores = query @ key.transpose(2, 3)
            scores = scores.masked_fill(~attention_mask.bool()[:, None, None, :], -1e9)
        return torch.softmax(scores, dim=-1).matmul(value).transpose(1, 2).reshape(*x.shape[:2], 16)


@pytest.mark.parametrize("spelling", ["divided", "bias first", "scaled query", "filled"])
def test_attention_by_hand(spelling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ByHand(spelling).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = (torch.randn(2, 5, 16), mask, torch.randn(1, 2, 5, 5))
    report = export_onnx(trace(model, inputs), tmp_path / "onnx", verify=False, keep_padding=True)
    assert report.attention is not None
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    feed = dict(zip((value.name for value in session.get_inputs()), (x.numpy() for x in inputs), strict=False))
    (actual,) = session.run(None, {name: value for name, value in feed.items() if name in feed})
    np.testing.assert_allclose(actual, model(*inputs).detach().numpy(), atol=1e-5)
    counts = operators(tmp_path / "onnx")
    assert counts["Attention"] + counts["MultiHeadAttention"] == report.attention.fused


def masks_of(function: Any) -> tuple[bool, bool]:
    """Return whether the mask of a module that returns `function(attention_mask)` has padding, and a rest beside it."""

    class Returns(nn.Module):
        def forward(self, attention_mask: Tensor) -> Tensor:
            return function(attention_mask)  # type: ignore[no-any-return]

    traced = trace(Returns(), (torch.tensor([[1, 1, 0], [1, 1, 1]]),))
    graph = copy_graph(traced.graph_module)
    simplify(graph)
    (mask,) = graph.output_node().all_input_nodes
    found = split_mask(mask)
    return found.padding is not None, found.rest is not None


SMALLEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m: m[:, None, None, :].bool(), (True, False)),
        (lambda m: m.bool()[:, None, None, :].expand(-1, 1, m.shape[1], -1), (True, False)),
        (lambda m: (1.0 - m[:, None, None, :].float()) * SMALLEST, (True, False)),
        (lambda m: torch.where(m[:, None, None, :] != 0, 0.0, SMALLEST), (True, False)),
        (
            lambda m: m[:, None, None, :].bool() & torch.ones(m.shape[1], m.shape[1]).tril().bool()[None, None],
            (True, True),
        ),
        # a window, another sequence of queries, keys that are shown where the mask is zero, and no mask at all
        (lambda m: m[:, None, :, None].bool(), (False, True)),
        (lambda m: m[:, None, None, :] == 0, (False, True)),
        (lambda m: (1.0 - m[:, None, None, :].float()) * -1.0, (False, True)),
        (lambda m: (m.cumsum(1) > 1)[:, None, None, :], (False, True)),
        (lambda m: m[:, None, None, :].float(), (False, True)),  # a bias of ones and zeros
    ],
)
def test_padding_is_told_from_the_rest_of_a_mask(function: Any, expected: tuple[bool, bool]) -> None:
    assert masks_of(function) == expected


def test_the_operator_is_pytorchs_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    padding, bias = text_batch(2, 5)["attention_mask"], torch.randn(1, 4, 5, 5)
    keys = padding.bool()[:, None, None, :]
    for mask, whole in ((None, keys), (keys, keys), (bias, bias.masked_fill(~keys, SMALLEST))):
        expected = nn.functional.scaled_dot_product_attention(query, key, value, whole, scale=0.3, enable_gqa=True)
        actual = DotProductAttention(query, key, value, mask, padding, scale=0.3, is_causal=False).result()
        torch.testing.assert_close(actual, expected)
