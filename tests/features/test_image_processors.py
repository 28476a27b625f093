"""Chats with images by transformers' processors of each form: its sizes, paddings, tiles and places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, GotOcr2Processor

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.images.program_graphs import DECODER
from gralora_fx.serving import load
from tests.architectures.image_pixels import features_of, pixels_of
from tests.architectures.image_prompts import wide_image_model
from tests.tiny_image_processors import drawn_image, tiny_processor

_NEW = 4
_FORMS = {  # whether other programs know how to call what reads pixels
    "AyaVisionForConditionalGeneration": True,  # tokens between its tiles
    "Gemma3ForConditionalGeneration": False,  # begins with a token that the template has written
    "Gemma4ForConditionalGeneration": False,
    "Glm4vForConditionalGeneration": True,
    "InternVLForConditionalGeneration": True,
    "JanusForConditionalGeneration": True,
    "Kimi_K25ForConditionalGeneration": True,
    "LightOnOcrForConditionalGeneration": False,
    "LlavaNextForConditionalGeneration": False,  # cuts each of several images
    "LlavaOnevisionForConditionalGeneration": False,  # cuts none of several images
    "Mistral3ForConditionalGeneration": False,
    "MllamaForConditionalGeneration": False,  # layers attend to images of one to four tiles
    "PaddleOCRVLForConditionalGeneration": True,
    "PaliGemmaForConditionalGeneration": False,  # all of a prompt sees each other
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of ids in a tensor, of GLM-4V's
@pytest.mark.parametrize("name", _FORMS)
def test_chats_with_images_are_answered_as_by_transformers_processors(name: str, tmp_path: Path) -> None:
    source = wide_image_model(name)
    export_onnx(
        trace(source, task="image-text-to-text-with-past"),
        tmp_path / "onnx",
        tokenizer=tiny_processor(source),
        verify=False,
    )
    model, processor = load(tmp_path / "onnx", threads=1), AutoProcessor.from_pretrained(tmp_path / "onnx")
    prompts, answers = model.generation.given_prompts, []
    assert prompts is not None
    decoder = model.decoder(rows=1, chunk=256)
    several = [[drawn_image(70, 50)], [drawn_image(30, 30, 1), drawn_image(100, 33, 2), drawn_image(33, 101, 3)]]
    for images in several:
        inputs = _inputs(processor, images)
        ids, given = prompts.read_one(_chat(len(images)), images, None)
        assert ids == inputs["input_ids"][0].tolist()
        row = decoder.open(None, given)
        with torch.no_grad():
            expected = source(**inputs).logits[0, -1]
            tokens = source.generate(**inputs, max_new_tokens=_NEW, do_sample=False)[0, len(ids) :]
        answers.append(processor.decode(tokens, skip_special_tokens=True))
        torch.testing.assert_close(torch.from_numpy(decoder.step({row: ids})[row]), expected, rtol=1e-4, atol=1e-4)
        decoder.close(row)
    for prompts, images in ((ids, several[0]), ([ids, "A text."], [several[0], None])):
        with pytest.raises(
            ServingError, match=r"prompts as text or chats.*give the text in place of ids, or the ids with in"
        ):
            model.generate(prompts, images=images, max_new_tokens=_NEW)
    text = model.generate("A text.", max_new_tokens=_NEW)
    chats = [_chat(1), "A text.", _chat(3)]
    found = model.generate(chats, images=[several[0], None, several[1]], max_new_tokens=_NEW)
    assert found == [answers[0], text, answers[1]]
    assert (tmp_path / "onnx" / f"{DECODER}.onnx").exists() == _FORMS[name]


def test_a_processor_that_takes_no_list_for_each_prompt_is_given_a_flat_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = wide_image_model("GotOcr2ForConditionalGeneration")
    monkeypatch.setattr(GotOcr2Processor, "num_image_tokens", features_of(source, pixels_of(source, 0)))
    processor = tiny_processor(source)
    export_onnx(
        trace(source, task="image-text-to-text-with-past"), tmp_path / "onnx", tokenizer=processor, verify=False
    )
    model, images = load(tmp_path / "onnx", threads=1), [drawn_image(70, 50)]
    text = processor.apply_chat_template(_chat(1), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    with torch.no_grad():
        tokens = source.generate(**inputs, max_new_tokens=_NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(tokens, skip_special_tokens=True)
    assert model.generate(_chat(1), images=images, max_new_tokens=_NEW) == expected


def test_an_adapter_of_tower_and_decoder_is_given_to_each_where_rows_run_one_after_the_other(tmp_path: Path) -> None:
    source = wide_image_model("Gemma3ForConditionalGeneration")
    layers = ["model.vision_tower.encoder.layers.0.mlp.fc1", "model.language_model.layers.0.self_attn.q_proj"]
    config = GraloraConfig(r=4, gralora_k=2, target_modules=layers)
    model = rewrite(trace(source, task="image-text-to-text-with-past"), config, adapter_name="own")
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.3)
    found = {}
    for kind, adapter in (("data", "own"), ("merged", None), ("data", None)):
        directory = tmp_path / kind
        if not directory.exists():
            export_onnx(model, directory, adapters=kind, tokenizer=tiny_processor(source), verify=False)
        served = load(directory, threads=1)
        assert served.generation.given_prompts is not None
        ids, given = served.generation.given_prompts.read_one(_chat(1), [drawn_image(70, 50)], adapter)
        decoder = served.decoder(rows=1, chunk=256)
        found[kind, adapter] = torch.from_numpy(decoder.step({decoder.open(adapter, given): ids})[0])
    torch.testing.assert_close(found["data", "own"], found["merged", None], rtol=1e-4, atol=1e-4)
    assert (found["data", None] - found["merged", None]).abs().max() > 0.1


def _chat(images: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": "What is it?"}]}]


def _inputs(processor: Any, images: list[Image.Image]) -> Any:
    """Return what transformers' own call makes of a chat with its images."""
    chat = _chat(len(images))
    parts = [{"type": "image", "image": image} for image in images]
    chat[0]["content"] = [*parts, chat[0]["content"][-1]]
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
