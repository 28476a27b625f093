"""BLIP's captioner as an encoder-decoder: answers are those of `generate` of transformers' class, and of peft."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from running import run
from torch import Tensor
from transformers import AutoProcessor, BlipForQuestionAnswering

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite, trace
from gralora_fx.errors import TraceError
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.loading import load_streamed
from gralora_fx.serving import load
from tests.made_once import made_once
from tests.tiny_image_processors import drawn_image
from tests.tiny_pixel_writers import START, tiny_captioner, tiny_captioners_processor

_NEW, _TASK = 6, "image-to-text-with-past"
_IMAGES = [drawn_image(70, 50), drawn_image(40, 90, seed=1)]
# of the tower, the decoder's own attention and the one that reads the image; LoRA of the second layer of each alone
_LAYERS = ["qkv", "query", "crossattention.self.value"]
_CONFIGS = {
    "gralora": peft.GraloraConfig(r=8, gralora_k=2, alpha=32, target_modules=_LAYERS),
    "lora": peft.LoraConfig(r=4, lora_alpha=32, target_modules=_LAYERS, layers_to_transform=[1]),
}


@functools.cache
def _traced() -> TracedModel:
    return trace(tiny_captioner(), task=_TASK)


def _exported(path: Path) -> None:
    """Write an export that takes adapters, and one with an adapter in it, which the command makes of a checkpoint."""
    for name, config in _CONFIGS.items():
        adapted = peft.get_peft_model(tiny_captioner(), config)
        torch.manual_seed(3)
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value.data, std=0.4)
        adapted.save_pretrained(str(path / name))
    model = GraloraModel.from_pretrained(_traced(), path / "gralora", adapter_name="gralora")
    processor = tiny_captioners_processor()
    report = export_onnx(model, path / "data", adapters="data", tokenizer=processor, verify="quick")
    assert report.verification is not None
    assert report.verification.passed
    export_adapter(path / "lora", path / "data", "lora")
    tiny_captioner().save_pretrained(path / "base")
    processor.save_pretrained(path / "base")
    given = ("--model", path / "base", "--adapter", path / "lora", "--output", path / "merged", "--verify", "quick")
    made = run("export", *given)
    assert made.status == 0, made.stderr


@pytest.fixture(scope="module")
def captioner() -> Path:
    return made_once("tiny-captioner", _exported)


def _expected(model: Any, pixels: Tensor, beginning: Sequence[int] = ()) -> list[list[int]]:
    """Return the new tokens of transformers' answers, given what its processor makes of a text."""
    options = {"input_ids": torch.tensor([[START, *beginning, 2]] * len(pixels))} if beginning else {}
    tokens = model.generate(pixel_values=pixels, max_new_tokens=_NEW, do_sample=False, **options)
    rows = [row[1 + len(beginning) :] for row in tokens.tolist()]
    return [row[: row.index(2)] if 2 in row else row for row in rows]


def test_captions_are_those_of_transformers_and_each_row_has_its_adapter(captioner: Path) -> None:
    processor = AutoProcessor.from_pretrained(captioner / "data")
    pixels = processor(images=_IMAGES, return_tensors="pt").pixel_values
    of_adapters = {
        name: _expected(peft.PeftModel.from_pretrained(tiny_captioner(), str(captioner / name)).eval(), pixels)
        for name in _CONFIGS
    }
    base = _expected(tiny_captioner(), pixels)
    wanted = [of_adapters["gralora"][0], of_adapters["lora"][0], base[0], base[1]]
    assert len(set(map(tuple, wanted))) == 4
    model, rows = load(captioner / "data"), [0, 0, 0, 1]
    adapters = ["gralora", "lora", None, None]
    assert model.generate(pixel_values=pixels[rows], adapter=adapters, max_new_tokens=_NEW) == wanted
    texts = processor.batch_decode(wanted, skip_special_tokens=True)
    assert model.generate(images=[_IMAGES[row] for row in rows], adapter=adapters, max_new_tokens=_NEW) == texts
    assert load(captioner / "merged").generate(images=_IMAGES[0], max_new_tokens=_NEW) == texts[1]


def test_a_text_begins_a_caption(captioner: Path) -> None:
    processor, model = AutoProcessor.from_pretrained(captioner / "data"), load(captioner / "data")
    pixels = processor(images=_IMAGES, return_tensors="pt").pixel_values
    ids = processor.tokenizer("HI", add_special_tokens=False).input_ids
    expected = _expected(tiny_captioner(), pixels, ids)
    assert expected != _expected(tiny_captioner(), pixels)
    texts = processor.batch_decode(expected, skip_special_tokens=True)
    assert model.generate(["HI", "HI"], images=_IMAGES, max_new_tokens=_NEW) == texts


def test_weights_that_are_read_from_their_files_give_the_same_graphs(captioner: Path, tmp_path: Path) -> None:
    streamed = trace(load_streamed(captioner / "base", _TASK), task=_TASK)
    for name, model in (("streamed", streamed), ("whole", _traced())):
        export_onnx(model, tmp_path / name, verify="quick")
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.onnx*"))
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_labels_give_the_loss_of_transformers() -> None:
    model = rewrite(_traced(), GraloraConfig(r=8, gralora_k=2, target_modules=_LAYERS))
    pixels, ids = torch.rand(2, 3, 32, 32), torch.randint(4, 90, (2, 6))
    ids[:, 0] = START
    expected = tiny_captioner()(pixel_values=pixels, input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(pixel_values=pixels, labels=ids[:, 1:]).loss, expected)


def test_a_model_of_questions_about_images_is_refused() -> None:
    model = BlipForQuestionAnswering(tiny_captioner().config)
    with pytest.raises(TraceError, match="the encoder of BlipForQuestionAnswering reads a question beside pixels"):
        trace(model, task=_TASK)
