"""Mllama, whose decoder has layers that attend to images: answers of transformers and PEFT, and rows of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from gralora_fx import GraloraModel, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.features.images import cross_form
from gralora_fx.features.images.cross_rows import CrossRows, cross_given, seen_by
from gralora_fx.serving import OrtModel, load
from tests.architectures.image_prompts import IMAGE, wide_image_model
from tests.tiny_image_processors import drawn_image, tiny_processor

_TASK, _NEW = "image-text-to-text-with-past", 6
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "fc1", "multi_modal_projector"]
_ADAPTERS = {
    "lora": peft.LoraConfig(r=2, lora_alpha=8, target_modules=_TARGETS),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, alpha=8, target_modules=_TARGETS),
}


def _source() -> PreTrainedModel:
    """Return a model whose answers depend on its images; its token of an image is beyond its vocabulary."""
    model = wide_image_model("MllamaForConditionalGeneration", IMAGE)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id = None
    return model


class Served(NamedTuple):
    """An export with an adapter as data, and another beside it, and PEFT's models with each folded in."""

    model: OrtModel
    sources: dict[str | None, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory, source = tmp_path_factory.mktemp("mllama"), _source()
    sources: dict[str | None, Any] = {None: source}
    for seed, (name, config) in enumerate(_ADAPTERS.items()):
        adapted = peft.get_peft_model(_source(), config)
        torch.manual_seed(seed)
        for key, value in adapted.named_parameters():
            if "lora" in key:
                torch.nn.init.normal_(value.data, std=0.2)
        adapted.save_pretrained(str(directory / name))
        # PEFT's own GraLoRA fails on the axes of the projector's input
        sources[name] = adapted.merge_and_unload().eval()
    model = GraloraModel.from_pretrained(trace(source, task=_TASK), directory / "lora", adapter_name="lora")
    report = export_onnx(model, directory / "onnx", adapters="data", tokenizer=tiny_processor(source), verify="quick")
    assert report.verification is not None
    assert report.verification.companions is not None
    assert report.verification.companions.agreement == 1.0
    export_adapter(directory / "gralora", directory / "onnx", "gralora")
    return Served(load(directory / "onnx", threads=1), sources)


def _chat(images: int) -> list[dict[str, Any]]:
    """Return a chat whose letters are all in the vocabulary."""
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": "What?"}]}]


_IMAGES = {  # of one tile, of several, and two of different shapes
    1: [drawn_image(30, 30)],
    2: [drawn_image(70, 50), drawn_image(33, 101, seed=1)],
    3: [drawn_image(100, 33, seed=2), drawn_image(20, 20, seed=3), drawn_image(64, 32, seed=4)],
}


def _expected(served: Served, images: int, adapter: str | None) -> str:
    processor = tiny_processor(served.sources[None])
    text = processor.apply_chat_template(_chat(images), add_generation_prompt=True, tokenize=False)
    given = {"images": [_IMAGES[images]]} if images else {}
    inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False, **given)
    with torch.no_grad():
        tokens = served.sources[adapter].generate(**inputs, max_new_tokens=_NEW, do_sample=False)
    return str(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("adapter", [None, *_ADAPTERS])
def test_rows_of_texts_and_images_are_answered_as_by_transformers_and_peft(adapter: str | None, served: Served) -> None:
    numbers = [0, 1, 2, 3]
    expected = [_expected(served, number, adapter) for number in numbers]
    images = [_IMAGES.get(number) for number in numbers]
    found = served.model.generate(
        [_chat(number) for number in numbers], images=images, adapter=[adapter] * 4, max_new_tokens=_NEW
    )
    assert found == expected
    assert len(set(expected)) == len(expected)  # they depend on the images


def test_an_adapter_that_is_merged_answers_as_peft(served: Served, tmp_path: Path) -> None:
    saved = served.model.directory.parent / "gralora"
    model = GraloraModel.from_pretrained(trace(_source(), task=_TASK), saved)
    export_onnx(model, tmp_path / "onnx", tokenizer=tiny_processor(_source()), verify=False)
    found = load(tmp_path / "onnx", threads=1).generate(_chat(2), images=_IMAGES[2], max_new_tokens=_NEW)
    assert found == _expected(served, 2, "gralora")


def test_a_row_is_bitwise_that_of_the_row_alone(served: Served) -> None:
    """Rows of texts, of the same image, and of one to three; rows with as many images are read in one run."""
    prompts = served.model.generation.given_prompts
    assert prompts is not None
    rows = [(number, adapter) for number in (1, 0, 2, 1, 3) for adapter in (None, "lora")]
    read = [prompts.read_one(_chat(number), _IMAGES.get(number, []), adapter) for number, adapter in rows]

    def logits(chosen: list[int]) -> list[list[Any]]:
        decoder = served.model.decoder(rows=len(chosen), chunk=64)
        opened = {decoder.open(rows[index][1], read[index][1]): read[index][0] for index in chosen}
        steps = []
        for _ in range(3):
            steps.append(decoder.step(opened))
            opened = {row: [int(steps[-1][row].argmax())] * 2 for row in opened}
        return [[step[row] for step in steps] for row in opened]

    together = logits(list(range(len(rows))))
    for index in range(len(rows)):
        np.testing.assert_array_equal(together[index], logits([index])[0])


@pytest.mark.parametrize("places", [[1], [0, 3], [1, 2, 6], [2, 4, 5, 6], [0, 7], [5, 6, 7]])
def test_tokens_see_the_images_that_transformers_lets_them_see(places: list[int]) -> None:
    ids = [9 if position in places else 1 for position in range(8)]
    masks = get_cross_attention_token_mask(ids, 9)
    expected = convert_sparse_cross_attention_mask_to_dense([masks], [[1] * len(places)], 1, len(ids))
    np.testing.assert_array_equal(seen_by(np.array(ids) == 9), expected[0, :, :, 0])


def test_tokens_that_see_other_images_than_the_models_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    form = cross_form.CrossForm(_source())
    assert form.check(torch.Generator().manual_seed(0)) is None
    monkeypatch.setattr(cross_form, "given_of", _all_seen)
    assert "differs by" in str(form.check(torch.Generator().manual_seed(0)))


def _all_seen(places: Any, outputs: Any, *_: Any) -> Any:
    from gralora_fx.features.images.image_rows import given_of

    given = given_of(places, outputs, None, 1)
    return {**given, "image_mask": np.ones_like(given["image_mask"])}


def test_rows_of_one_image_share_its_keys_and_values() -> None:
    rows, places = CrossRows(), np.array([True, False])
    drawn = np.zeros((1, 1, 2, 4, 4, 5), np.float32)
    outputs = {"image_keys": drawn, "image_values": np.moveaxis(drawn, 3, -1), "image_tiles": np.array([1, 1, 0, 0])}
    for row in range(3):
        rows.begin(row, cross_given(places, [outputs if row < 2 else {**outputs, "image_keys": drawn + 1}]))
    read = {row: [1, 2] for row in range(3)}
    fed = rows.arrays(read, dict.fromkeys(read, 0), range(4), 2)
    assert fed["image_keys"].shape == (1, 2, 2, 4, 4, 5)
    assert fed["image_mask"].shape == (4, 2, 2, 4)
    assert (fed["image_mask"].max((1, 3)) == [[1, -1], [1, -1], [-1, 1], [-1, -1]]).all()
    rows.begin(2, {})
    assert rows.arrays(read, dict.fromkeys(read, 0), range(4), 2)["image_keys"] is drawn


def test_what_a_row_is_given_of_images_is_whole_and_counts_as_its_memory(served: Served) -> None:
    prompts = served.model.generation.given_prompts
    assert prompts is not None
    _, given = prompts.read_one(_chat(1), _IMAGES[1], None)
    assert given is not None
    decoder = served.model.decoder(rows=1)
    with pytest.raises(ServingError, match="takes image_keys, image_values and image_mask of as many tiles"):
        decoder.open(None, {name: value for name, value in given.items() if name != "image_values"})
    with pytest.raises(ServingError, match="of as many tiles"):
        decoder.open(None, {**given, "image_keys": given["image_keys"][..., :1, :]})
    with pytest.raises(ServingError, match="image_mask is of 1 rows of 1 tokens"):
        decoder.open(None, {**given, "image_mask": given["image_mask"][:, :1]})
    with pytest.raises(ServingError, match="one set of images"):
        decoder.open(None, {**given, "image_mask": given["image_mask"].repeat(2, 2)})
    taken = 2 * (given["image_keys"].nbytes + given["image_values"].nbytes)
    assert decoder.row_size(64, given) == decoder.row_size(64) + taken
