"""Models that read images, unchanged in onnxruntime-genai and transformers.js: the tokens are those of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from javascript_project import installed_project, needs_node, run_script
from PIL import Image
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx, fold_onnx, verify_onnx
from gralora_fx.features.images.program_graphs import DECODER, EMBED_TOKENS, EMBEDDING
from tests.architectures.image_prompts import IMAGE, wide_image_model
from tests.genai_client import genai_answer
from tests.tiny_image_processors import drawn_image, tiny_processor

_QWEN = "Qwen2_5_VLForConditionalGeneration"
_TASK, _NEW = "image-text-to-text-with-past", 6
_PLACE = {"qwen": "<|vision_start|><|image_pad|><|vision_end|>", "llava": "<image>"}


class Exported(NamedTuple):
    """An export, and the model and the processor that it is of."""

    directory: Path
    source: PreTrainedModel
    processor: Any

    def expected(self, text: str, images: list[Image.Image]) -> tuple[list[int], Any]:
        """Return the tokens of transformers, and what its processor made of both."""
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        with torch.no_grad():
            tokens = self.source.generate(**inputs, max_new_tokens=_NEW, do_sample=False)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist(), inputs


def _source(name: str) -> PreTrainedModel:
    source = wide_image_model(name)
    source.config.vision_start_token_id = 88  # of the processor's tokenizer
    return source


def _exported(name: str, directory: Path) -> Exported:
    source = _source(name)
    processor = tiny_processor(source)
    export_onnx(trace(source, task=_TASK), directory, tokenizer=processor, verify="quick")
    return Exported(directory, source, processor)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported(_QWEN, tmp_path_factory.mktemp("qwen") / "export")


def _text(kind: str, images: int) -> str:
    return f"Look: {_PLACE[kind] * images}What is it?"


def _check_genai(exported: Exported, folder: Path, count: int) -> None:
    """Compare tokens, ids, and the pixels of a lone image, which both resize by Pillow's arithmetic."""
    images = [drawn_image(*size, seed=seed) for seed, size in enumerate([(140, 100), (60, 60)][:count][::-1])]
    paths = [folder / f"{index}.png" for index in range(count)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    text = _text("qwen", count)
    expected, inputs = exported.expected(text, images)
    tokens, read = genai_answer(exported.directory, text, paths, _NEW)
    assert read["input_ids"].tolist() == inputs["input_ids"].tolist()
    if count == 1:
        assert np.allclose(read["pixel_values"], inputs["pixel_values"], atol=1e-5)
    assert tokens == expected
    assert len(set(tokens)) > 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_genai_answers_about_images_as_transformers(count: int, qwen: Exported, tmp_path: Path) -> None:
    _check_genai(qwen, tmp_path, count)


def test_genai_answers_about_images_of_a_model_with_states(tmp_path: Path) -> None:
    _check_genai(_exported("Qwen3_5ForConditionalGeneration", tmp_path / "export"), tmp_path, 1)


def test_genai_reads_texts_alone_where_adapters_are_data(tmp_path: Path) -> None:
    """It gives no adapters to models of several graphs."""
    adapted = rewrite(trace(_source(_QWEN), task=_TASK), GraloraConfig(r=4, target_modules=["q_proj"]))
    processor = tiny_processor(_source(_QWEN))
    export_onnx(adapted, tmp_path / "data", adapters="data", tokenizer=processor, verify=False)
    export_onnx(adapted, tmp_path / "inputs", adapters="inputs", tokenizer=processor, verify=False)
    described = json.loads((tmp_path / "data" / "genai_config.json").read_text())["model"]
    assert (described["type"], described["decoder"]["filename"]) == ("decoder", "model.onnx")
    assert (tmp_path / "data" / f"{DECODER}.onnx").is_file()
    assert not (tmp_path / "inputs" / f"{DECODER}.onnx").exists()


@needs_node
def test_transformers_js_answers_about_images_as_transformers(qwen: Exported, tmp_path: Path) -> None:
    """By its own processor; it resizes otherwise than Pillow, so the image has the size of whole patches."""
    image = drawn_image(140, 112, seed=3)
    image.save(tmp_path / "image.png")
    text, path = _text("qwen", 1), str(tmp_path / "image.png")
    request = {"model": str(qwen.directory), "class": _QWEN, "text": text, "image": path, "options": _options()}
    tokens = run_script(installed_project(), "images.mjs", json.dumps(request))
    assert tokens == qwen.expected(text, [image])[0]


@needs_node
def test_transformers_js_reads_tiles(tmp_path: Path) -> None:
    name = "LlavaForConditionalGeneration"
    exported = _exported(name, tmp_path / "export")
    expected, inputs = exported.expected(_text("llava", 1), [drawn_image(70, 50)])
    pixels = inputs["pixel_values"]
    given = {"ids": inputs["input_ids"][0].tolist(), "pixels": pixels.flatten().tolist(), "dims": list(pixels.shape)}
    request = {"model": str(exported.directory), "class": name, **given, "options": _options()}
    assert run_script(installed_project(), "images.mjs", json.dumps(request)) == expected


def _options() -> dict[str, Any]:
    return {"max_new_tokens": _NEW, "eos_token_id": None}


@pytest.mark.parametrize("name", [DECODER, EMBEDDING, EMBED_TOKENS])
def test_a_quick_verification_compares_the_graphs_of_other_programs(name: str, qwen: Exported, tmp_path: Path) -> None:
    shutil.copytree(qwen.directory, tmp_path / "export")
    path = tmp_path / "export" / f"{name}.onnx"
    model = onnx_ir.load(path)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = onnx_ir.AttrInt64("local_window_size", 2)
        elif node.op_type == "ScatterND":
            node.attributes["reduction"] = onnx_ir.AttrString("reduction", "add")
    if name == EMBED_TOKENS:
        (embeds,) = model.graph.outputs
        negated = onnx_ir.node("Neg", [embeds])
        embeds.name, negated.outputs[0].name = "of_ids", embeds.name
        negated.outputs[0].shape, negated.outputs[0].type = embeds.shape, embeds.type
        model.graph.append(negated)
        model.graph.outputs[:] = negated.outputs
    onnx_ir.save(model, path)
    report = verify_onnx(tmp_path / "export", trace(qwen.source, task=_TASK), "quick", check=False)
    assert report.companions is not None
    assert not report.companions.passed
    assert (
        report.companions.step_errors[0] > 0.01 > report.companions.step_errors[1]
    )  # that `model.onnx` gives is right
    assert not report.passed


def test_an_adapter_folded_into_an_export_is_in_the_graphs_of_other_programs(qwen: Exported, tmp_path: Path) -> None:
    """They are over the same weights: logits of `model.onnx` and of embeddings that the other graph makes agree."""
    config = GraloraConfig(r=4, target_modules=["q_proj", "up_proj"], init_weights=False)
    adapted = rewrite(trace(qwen.source, task=_TASK), config)
    adapted.save_pretrained(tmp_path / "adapter")
    fold_onnx(qwen.directory, tmp_path / "adapter", tmp_path / "folded")
    features = torch.randn(1, 3, 32).numpy()
    ids = np.array([[5, IMAGE, IMAGE, IMAGE, 7]])
    embeds = np.concatenate([np.zeros((1, 1, 32), np.float32), features, np.zeros((1, 1, 32), np.float32)], axis=1)
    places = np.arange(5)[None]
    logits = []
    for directory in (qwen.directory, tmp_path / "folded"):
        own, decoder, embedding = (
            onnxruntime.InferenceSession(directory / f"{name}.onnx") for name in ("model", DECODER, EMBEDDING)
        )
        shared = {"attention_mask": np.ones_like(ids)}
        for value in decoder.get_inputs():
            if value.name.startswith("past_key_values."):
                shared[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        by_ids = {
            **shared,
            "input_ids": np.where(ids == IMAGE, -1, ids),
            "inputs_embeds": embeds,
            "position_ids": places,
        }
        joined = embedding.run(None, {"input_ids": ids, "image_features": features[0]})[0]
        by_embeds = {**shared, "inputs_embeds": joined, "position_ids": np.stack([places] * 3)}
        logits.append(own.run(["logits"], by_ids)[0])
        assert np.allclose(decoder.run(["logits"], by_embeds)[0], logits[-1], atol=1e-5)
    assert not np.allclose(*logits, atol=1e-3)
