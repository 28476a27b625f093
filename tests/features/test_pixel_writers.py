"""Encoder-decoders that write down what an image shows, as TrOCR and Donut: their answers are those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from running import run
from transformers import AutoImageProcessor, AutoProcessor

from gralora_fx import GraloraModel, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load
from tests.made_once import made_once
from tests.tiny_image_processors import drawn_image
from tests.tiny_pixel_writers import START, tiny_pixel_writer, tiny_writers_processor

_NEW = 6
_IMAGES = [drawn_image(70, 50), drawn_image(40, 90, seed=1)]


def _exported(path: Path) -> None:
    """Export a TrOCR that takes adapters, and one of encoder, projection and decoder."""
    adapted = peft.get_peft_model(tiny_pixel_writer("trocr"), _CONFIG)
    torch.manual_seed(3)
    for key, value in adapted.named_parameters():
        if "gralora" in key:
            torch.nn.init.normal_(value.data, std=0.3)
    adapted.save_pretrained(str(path / "adapter"))
    source = trace(tiny_pixel_writer("trocr"), task="image-to-text-with-past")
    model = GraloraModel.from_pretrained(source, path / "adapter", adapter_name="own")
    processor = tiny_writers_processor("trocr")
    for name, options in (("data", {"adapters": "data"}), ("merged", {})):
        report = export_onnx(model, path / name, tokenizer=processor, verify="quick", **options)
        assert report.verification is not None
        assert report.verification.passed


_CONFIG = peft.GraloraConfig(r=8, gralora_k=2, alpha=32, target_modules=["q_proj", "enc_to_dec_proj"])


@pytest.fixture(scope="module")
def trocr() -> Path:
    return made_once("tiny-trocr", _exported)


def _expected(model: Any, pixels: torch.Tensor, beginning: Sequence[int] = ()) -> list[list[int]]:
    """Return the new tokens of transformers' answers."""
    options = {"decoder_input_ids": torch.tensor([beginning] * len(pixels))} if beginning else {}
    with torch.no_grad():
        tokens = model.generate(pixel_values=pixels, max_new_tokens=_NEW, do_sample=False, **options)
    rows = [row[row.index(beginning[-1]) + 1 if beginning else 1 :] for row in tokens.tolist()]
    return [row[: row.index(2)] if 2 in row else row for row in rows]


def test_each_row_is_answered_by_its_own_adapter_as_by_peft(trocr: Path) -> None:
    adapted = peft.PeftModel.from_pretrained(tiny_pixel_writer("trocr"), str(trocr / "adapter")).eval()
    processor = AutoProcessor.from_pretrained(trocr / "data")
    pixels = processor(images=_IMAGES, return_tensors="pt").pixel_values
    (own, _), (base, other) = _expected(adapted, pixels), _expected(tiny_pixel_writer("trocr"), pixels)
    assert own != base
    model = load(trocr / "data")
    rows = [0, 0, 1]
    found = model.generate(pixel_values=pixels[rows], adapter=["own", None, None], max_new_tokens=_NEW)
    assert found == [own, base, other]
    texts = processor.batch_decode(found, skip_special_tokens=True)
    given = [_IMAGES[row] for row in rows]
    assert model.generate(images=given, adapter=["own", None, None], max_new_tokens=_NEW) == texts
    assert load(trocr / "merged").generate(images=_IMAGES[0], max_new_tokens=_NEW) == texts[0]


def test_a_prompt_begins_the_answer(trocr: Path) -> None:
    model, pixels = load(trocr / "data"), torch.rand(2, 3, 32, 32)
    expected = _expected(tiny_pixel_writer("trocr"), pixels, (40, 41))
    assert model.generate([[40, 41]] * 2, pixel_values=pixels, max_new_tokens=_NEW) == expected
    assert model.generate([[START, 40, 41]] * 2, pixel_values=pixels, max_new_tokens=_NEW) == expected
    assert model.generate([40, 41], pixel_values=pixels[:1], max_new_tokens=_NEW) == expected[0]
    text = model.generate("HI", images=_IMAGES[0], max_new_tokens=_NEW)
    assert [text] == model.generate(["HI"], images=[_IMAGES[0]], max_new_tokens=_NEW)


def test_a_prompt_of_donut_stands_in_place_of_its_start_token(tmp_path: Path) -> None:
    source, processor = tiny_pixel_writer("donut"), tiny_writers_processor("donut")
    export_onnx(trace(source, task="image-to-text-with-past"), tmp_path / "onnx", tokenizer=processor)
    own = AutoProcessor.from_pretrained(tmp_path / "onnx")
    pixels = own(images=_IMAGES, return_tensors="pt").pixel_values
    ids = own.tokenizer("HI", add_special_tokens=False).input_ids
    texts = own.batch_decode(_expected(source, pixels, ids), skip_special_tokens=True)
    model = load(tmp_path / "onnx")
    assert model.generate(["HI", "HI"], images=_IMAGES, max_new_tokens=_NEW) == texts
    assert model.generate(pixel_values=pixels, max_new_tokens=_NEW) == _expected(source, pixels)


def test_the_command_line_finds_the_task_and_the_image_processor_beside_the_tokenizer(tmp_path: Path) -> None:
    source = tiny_pixel_writer("vit-gpt2")
    for part in (source, *tiny_writers_processor("vit-gpt2")):
        part.save_pretrained(tmp_path / "base")
    made = run("export", "--model", tmp_path / "base", "--output", tmp_path / "onnx")
    assert made.status == 0, made.stderr
    model, image = load(tmp_path / "onnx"), tmp_path / "a.png"
    assert model.task == "image-to-text-with-past"
    _IMAGES[0].save(image)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "base")(images=_IMAGES[:1], return_tensors="pt").pixel_values
    text = model.tokenizer.decode(_expected(source, pixels)[0], skip_special_tokens=True)
    given = ("generate", "--onnx", tmp_path / "onnx", "--max-new-tokens", _NEW)
    answer = run(*given, "--image", image)
    assert (answer.status, answer.stdout) == (0, f"{text}\n"), answer.stderr
    assert run(*given, "--prompt", "A").error.startswith(
        f"{tmp_path / 'onnx'} reads images, not text; give --image FILE"
    )
    twice = run(*given, "--image", image, "--image", image).error
    assert twice == "the model reads one image for an answer, and 2 were given; give one"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "reads images, not text; give images, or pixel_values"),
        ({"prompts": "text"}, "reads images, not text"),
        ({"images": _IMAGES[0], "pixel_values": np.zeros((1, 3, 32, 32))}, "images and pixel_values are both given"),
        ({"prompts": "text", "images": _IMAGES}, "1 prompts and 2 images were given; give one for each answer"),
        ({"images": [_IMAGES]}, "the model reads one image for an answer, and 2 were given"),
        ({"images": [b"no"]}, "image 1"),
        ({"images": _IMAGES[0], "language": "en"}, "language has no effect: the model reads images"),
        ({"images": _IMAGES[0], "input_ids": [[1]]}, "input_ids has no effect: the beginning of an answer is a prompt"),
        ({"images": _IMAGES[0], "prompts": [{"role": "user", "content": "a"}]}, "a prompt is the beginning of an"),
        ({"images": _IMAGES[0], "prompts": [1000]}, "token 1000, outside the vocabulary"),
        ({"pixel_values": np.zeros((1, 3, 8, 8))}, r"has shape \[1, 3, 8, 8\], but the model takes"),
        ({"input_features": np.zeros((1, 3, 8))}, "takes pixel_values, not input_features"),
    ],
)
def test_what_such_a_model_does_not_take_is_refused(trocr: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        load(trocr / "data").generate(**given)
