"""Encoder-decoders whose encoder reads images within a prompt, as Florence-2: answers are those of transformers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx_ir
import peft
import pytest
import torch
from running import run
from transformers import AutoProcessor

from gralora_fx import GraloraModel, TracedModel, trace
from gralora_fx.errors import ExportError, ServingError, TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.rules.products.initializers import product_weights
from gralora_fx.serving import load
from tests.made_once import made_once
from tests.tiny_image_processors import drawn_image
from tests.tiny_pixel_writers import tiny_florence, tiny_florence_processor

_NEW, _TASK = 6, "image-to-text-with-past"
_IMAGE, _PROMPT = drawn_image(70, 50), "What is it?"
# of the tower, the projector, the encoder and the decoder
_CONFIG = peft.GraloraConfig(r=8, gralora_k=2, alpha=32, target_modules=["qkv", "image_projection", "q_proj", "fc1"])


@functools.cache
def _traced() -> TracedModel:
    return trace(tiny_florence(), task=_TASK)


def _exported(path: Path) -> None:
    adapted = peft.get_peft_model(tiny_florence(), _CONFIG)
    torch.manual_seed(3)
    for key, value in adapted.named_parameters():
        if "gralora" in key:
            torch.nn.init.normal_(value.data, std=0.3)
    adapted.save_pretrained(str(path / "adapter"))
    model = GraloraModel.from_pretrained(_traced(), path / "adapter", adapter_name="own")
    for name, options in (("data", {"adapters": "data"}), ("merged", {})):
        report = export_onnx(model, path / name, tokenizer=tiny_florence_processor(), verify="quick", **options)
        assert report.verification is not None
        assert report.verification.passed
        assert report.verification.companions is not None
        assert report.verification.companions.agreement == 1.0


@pytest.fixture(scope="module")
def florence() -> Path:
    return made_once("tiny-florence", _exported)


def _expected(model: Any, processor: Any, image: Any = None, prompt: str = _PROMPT) -> str:
    """Return the answer of transformers to a prompt with an image, or to a text as the tokenizer has it."""
    options = {"text": [prompt], "return_tensors": "pt"}
    read = processor.tokenizer(**options) if image is None else processor(images=[[image]], **options)
    known = {name: value for name, value in read.items() if name != "token_type_ids"}
    with torch.no_grad():
        tokens = model.generate(**known, max_new_tokens=_NEW, do_sample=False)[0]
    return str(processor.tokenizer.decode(tokens, skip_special_tokens=True))


def test_prompts_with_an_image_and_texts_alone_are_answered_as_by_transformers_and_peft(florence: Path) -> None:
    adapted = peft.PeftModel.from_pretrained(tiny_florence(), str(florence / "adapter")).eval()
    model, processor, source = (
        load(florence / "data"),
        AutoProcessor.from_pretrained(florence / "data"),
        tiny_florence(),
    )
    own, base = _expected(adapted, processor, _IMAGE), _expected(source, processor, _IMAGE)
    text, caption = _expected(source, processor), _expected(source, processor, _IMAGE, "<CAPTION>")
    assert len({own, base, text, caption}) == 4
    assert model.generate(_PROMPT, images=[_IMAGE], max_new_tokens=_NEW) == base
    assert model.generate(_PROMPT, max_new_tokens=_NEW) == text
    prompts = [_PROMPT, _PROMPT, _PROMPT, "<CAPTION>"]
    images, adapters = [[_IMAGE], [_IMAGE], None, _IMAGE], ["own", None, None, None]
    answers = model.generate(prompts, images=images, adapter=adapters, max_new_tokens=_NEW)
    assert answers == [own, base, text, caption]
    assert load(florence / "merged").generate(_PROMPT, images=[_IMAGE], max_new_tokens=_NEW) == own
    alone = _expected(source, processor, _IMAGE, "")
    assert model.generate(images=_IMAGE, max_new_tokens=_NEW) == alone
    assert model.generate(images=[_IMAGE], max_new_tokens=_NEW) == [alone]


@pytest.mark.parametrize(("quantize", "storage"), [("int8-dynamic", "columns"), ("int4", "blocks")])
def test_all_three_parts_are_quantized_and_compared(quantize: str, storage: str, tmp_path: Path) -> None:
    report = export_onnx(_traced(), tmp_path, tokenizer=tiny_florence_processor(), quantize=quantize, verify="quick")
    assert report.verification is not None
    assert report.verification.passed
    for part in ("vision_encoder", "encoder_model", "decoder_model_merged"):
        graph = onnx_ir.load(tmp_path / f"{part}.onnx").graph
        assert {weight.storage for weight in product_weights(graph)} == {storage}, part
    assert report.verification.companions is not None
    assert report.verification.companions.agreement == 1.0
    assert isinstance(load(tmp_path).generate(_PROMPT, images=_IMAGE, max_new_tokens=_NEW), str)


def test_the_command_line_asks_about_an_image(florence: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    _IMAGE.save(image)
    given = ("generate", "--onnx", florence / "merged", "--max-new-tokens", _NEW, "--image", image)
    expected = load(florence / "merged").generate(_PROMPT, images=[_IMAGE], max_new_tokens=_NEW)
    answer = run(*given, "--prompt", _PROMPT)
    assert (answer.status, answer.stdout) == (0, f"{expected}\n"), answer.stderr
    assert run(*given).stdout == load(florence / "merged").generate("", images=[_IMAGE], max_new_tokens=_NEW) + "\n"
    assert run(*given, "--image", image, "--prompt", _PROMPT).error.startswith(
        "the model reads one image for an answer"
    )


def test_images_that_it_does_not_take_are_refused(florence: Path) -> None:
    model = load(florence / "data")
    with pytest.raises(ServingError, match="the processor does not take the prompt with 2 images"):
        model.generate(_PROMPT, images=[_IMAGE, _IMAGE])
    with pytest.raises(ServingError, match="pixel_values has no effect: the model reads text"):
        model.generate(_PROMPT, pixel_values=torch.zeros(1, 3, 768, 768))
    with pytest.raises(ServingError, match="inputs_embeds has no effect: an encoder-decoder's encoder reads"):
        model.generate(_PROMPT, inputs_embeds=torch.zeros(1, 4, 32))


def test_a_model_whose_tower_cannot_be_traced_is_refused_and_its_texts_are_exported(tmp_path: Path) -> None:
    source = tiny_florence()
    source.config.vision_config.model_type = "of a size that is not known"
    with pytest.raises(
        ExportError, match=r"the size of the images of Florence2.* is not known.*text2text-generation-with"
    ):
        export_onnx(trace(source, task=_TASK), tmp_path / "whole")
    with pytest.raises(TraceError, match="takes pixel_values or input_ids, but"):
        trace(_pix2struct(), task=_TASK)


def _pix2struct() -> Any:
    from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration

    sizes = {"hidden_size": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    vision = {**sizes, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_embed_hidden_size": 16}
    return Pix2StructForConditionalGeneration(
        Pix2StructConfig(text_config={**sizes, "vocab_size": 20}, vision_config=vision)
    )
