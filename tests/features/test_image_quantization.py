"""Quantized vision encoders: stored, compared, measured on pictures, and with adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.core.model.rewrite import merge_lazily
from gralora_fx.errors import ExportError
from gralora_fx.exporters import ExportReport, export_onnx, fold_onnx
from gralora_fx.exporters.rules.products.initializers import product_weights
from gralora_fx.serving import load
from tests.architectures.image_prompts import wide_image_model
from tests.tiny_image_processors import drawn_image, tiny_processor
from tests.tiny_models import tiny_model

_LLAVA, _TASK = "LlavaForConditionalGeneration", "image-text-to-text-with-past"
_CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return wide_image_model(_LLAVA)


def _export(source: PreTrainedModel, directory: Path, **options: Any) -> ExportReport:
    return export_onnx(trace(source, task=_TASK), directory, tokenizer=tiny_processor(source), **options)


def _error(directory: Path, source: PreTrainedModel) -> float:
    """Return the relative error of features of random tiles, beside the model's own code."""
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    (found,) = (
        load(directory).companion_session("vision_encoder").run(["image_features"], {"pixel_values": pixels.numpy()})
    )
    with torch.no_grad():
        expected = torch.cat(list(source.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
    expected = expected.reshape(found.shape).numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("options", "storage", "bits", "least", "most"),
    [
        ({"quantize": "int4"}, "blocks", 8, 1e-3, 0.04),  # of the decoder
        ({"quantize": "int4", "quantize_companions": "int4", "bits": 4}, "blocks", 4, 0.04, 0.25),
        ({"quantize": "int8-dynamic"}, "columns", 8, 1e-3, 0.04),
    ],
)
def test_a_vision_encoder_is_quantized_with_its_decoder(
    options: dict[str, Any],
    storage: str,
    bits: int,
    least: float,
    most: float,
    source: PreTrainedModel,
    tmp_path: Path,
) -> None:
    report = _export(source, tmp_path / "onnx", **options)
    assert report.verification is not None
    assert report.verification.passed
    graph = onnx_ir.load(tmp_path / "onnx" / "vision_encoder.onnx").graph
    assert [weight.storage for weight in product_weights(graph)] == [
        storage
    ] * 8  # four of the layer's attention and two of its MLP, and the projector's
    assert least <= _error(tmp_path / "onnx", source) <= most
    assert report.quality is not None
    assert report.quality.companions is not None
    (output,) = report.quality.companions.outputs
    assert output.name == "vision_encoder: image_features"
    assert output.mean_error is not None
    assert least <= output.mean_error <= most
    assert report.quality.companions.inputs == "8 drawn pictures"
    assert report.quality.companions.tokens[0].positions == 12
    entry = json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())["companions"]["vision_encoder"]
    assert entry["quantization"]["bits"] == bits
    assert "vision_encoder.onnx in int" in report.details
    assert isinstance(load(tmp_path / "onnx").generate(_CHAT, images=[drawn_image(70, 50)], max_new_tokens=3), str)


def test_adapters_of_a_quantized_tower_are_data_and_folded(source: PreTrainedModel, tmp_path: Path) -> None:
    """Verification compares each state with the model of the same rounded weights."""
    layers = ["model.vision_tower.encoder.layers.0.mlp.fc1", "model.language_model.layers.0.self_attn.q_proj"]
    model = rewrite(
        trace(source, task=_TASK), GraloraConfig(r=4, gralora_k=2, target_modules=layers), adapter_name="own"
    )
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.3)
    processor, options = tiny_processor(source), {"quantize": "int4", "quantize_companions": "int8-dynamic"}
    report = export_onnx(model, tmp_path / "data", adapters="data", tokenizer=processor, **options)
    assert report.quality is not None
    assert report.quality.companions is not None
    assert [tokens.adapter for tokens in report.quality.companions.tokens] == [None, "own"]
    assert all(output.mean_error < 0.05 for output in report.quality.companions.outputs)
    images = [drawn_image(70, 50)]
    answers = load(tmp_path / "data").generate(
        [_CHAT] * 2, images=[images] * 2, adapter=["own", None], max_new_tokens=6
    )
    assert answers[0] != answers[1]
    model.save_pretrained(tmp_path / "adapter")
    _export(source, tmp_path / "base", quantize="int8")
    fold_onnx(tmp_path / "base", tmp_path / "adapter" / "own", tmp_path / "folded", requantize=True)
    merged = wide_image_model(_LLAVA)
    folded = dict(merge_lazily(model).tree.parameters)
    with torch.no_grad():
        for path in layers:
            merged.get_submodule(path).weight.copy_(values_of(folded[f"{path}.weight"], path))
    assert _error(tmp_path / "folded", merged) < 0.04


def test_another_kind_for_what_runs_beside_a_decoder_needs_both(source: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="quantize_companions='int8' is for a quantized decoder, and nothing is quantized"
    ):
        _export(source, tmp_path / "onnx", quantize_companions="int8")
    text = trace(tiny_model("llama"), task="text-generation-with-past")
    with pytest.raises(
        ExportError, match="quantize_companions='int8' has no effect: nothing is exported that runs beside"
    ):
        export_onnx(text, tmp_path / "onnx", quantize="int4", quantize_companions="int8")
