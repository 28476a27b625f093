"""Models that read images, whole: exported with what reads pixels, and their answers those of transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel

from gralora_fx import GraloraModel, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.loading import load_model, load_streamed
from gralora_fx.serving import OrtModel, load
from tests.architectures.image_prompts import tiny_image_model
from tests.tiny_image_processors import drawn_image, tiny_processor

_QWEN, _IDEFICS = "Qwen2_5_VLForConditionalGeneration", "Idefics3ForConditionalGeneration"
_WHOLE = ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"]
_WHOLE += ["Qwen3_5ForConditionalGeneration"]
_SIZES = {"vocab_size": 128, "max_position_embeddings": 512}
_NEW = 6


class Whole(NamedTuple):
    """An export, and the model that it is of."""

    model: OrtModel
    source: PreTrainedModel | peft.PeftModel
    processor: Any  # as it was saved beside the export

    def expected(self, chat: Any, images: list[Image.Image]) -> str:
        """Return the answer of transformers to a chat with images."""
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[text], images=[images], return_tensors="pt")
        with torch.no_grad():
            tokens = self.source.generate(**inputs, max_new_tokens=_NEW, do_sample=False)
        return str(self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _chat(images: int, text: str = "What is it?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]


def _whole(name: str, directory: Path) -> Whole:
    source = tiny_image_model(name, **_SIZES).eval()
    processor = tiny_processor(source)
    report = export_onnx(trace(source, task="image-text-to-text-with-past"), directory, tokenizer=processor)
    assert report.verification is not None
    assert report.verification.companions is not None
    assert report.verification.companions.agreement == 1.0
    return Whole(load(directory), source, AutoProcessor.from_pretrained(directory))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _whole(_IDEFICS, tmp_path_factory.mktemp("tiles") / "export")


@pytest.mark.parametrize("name", _WHOLE)
def test_answers_to_images_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    whole = _whole(name, tmp_path / "export")
    for images in ([drawn_image(70, 50)], [drawn_image(70, 50), drawn_image(40, 90, seed=1)]):
        chat = _chat(len(images))
        assert whole.model.generate(chat, images=images, max_new_tokens=_NEW) == whole.expected(chat, images)


def test_a_streamed_model_is_exported_whole_with_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_image_model("LlavaForConditionalGeneration", **_SIZES)
    source.save_pretrained(tmp_path / "base")
    task = "image-text-to-text-with-past"
    for load_base in (load_model, load_streamed):
        report = export_onnx(trace(load_base(tmp_path / "base", task), task=task), tmp_path / load_base.__name__)
        assert report.verification is not None
        assert report.verification.companions is not None
    whole, streamed = tmp_path / "load_model", tmp_path / "load_streamed"
    names = sorted(path.name for path in whole.iterdir())
    assert "vision_encoder.onnx" in names
    for name in set(names) - {"gralora_export.json"}:  # where last digits of differences are others
        assert (whole / name).read_bytes() == (streamed / name).read_bytes(), name


def test_rows_with_images_and_rows_of_text_share_steps(tiles: Whole) -> None:
    first, second = [drawn_image(70, 50)], [drawn_image(40, 90, seed=1), drawn_image(64, 64, seed=2)]
    prompts = [_chat(1), "A text alone.", _chat(2)]
    answers = tiles.model.generate(prompts, images=[first, None, second], max_new_tokens=_NEW)
    assert answers == [
        tiles.expected(prompts[0], first),
        tiles.model.generate("A text alone.", max_new_tokens=_NEW),
        tiles.expected(prompts[2], second),
    ]


def test_an_image_is_read_once_and_another_of_its_size_is_not_taken_for_it(
    tiles: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    from gralora_fx.features.images import image_prompts

    run = image_prompts.run_arrays
    monkeypatch.setattr(image_prompts, "run_arrays", lambda *args: runs.append(args) or run(*args))
    one, other = drawn_image(33, 21, seed=7), drawn_image(33, 21, seed=8)
    first = tiles.model.generate(_chat(1), images=[one], max_new_tokens=_NEW)
    count = len(runs)
    assert count > 0
    assert tiles.model.generate(_chat(1), images=[one], max_new_tokens=_NEW) == first
    assert len(runs) == count
    assert tiles.model.generate(_chat(1), images=[other], max_new_tokens=_NEW) == tiles.expected(_chat(1), [other])
    assert len(runs) > count


def test_a_chat_without_places_has_its_images_before_its_text(tiles: Whole) -> None:
    image = drawn_image(70, 50)
    plain = [{"role": "user", "content": "What is it?"}]
    assert tiles.model.generate(plain, images=[image], max_new_tokens=_NEW) == tiles.expected(_chat(1), [image])


def test_images_are_given_as_paths_bytes_and_arrays(tiles: Whole, tmp_path: Path) -> None:
    image = drawn_image(70, 50)
    path = tmp_path / "picture.png"
    image.save(path)
    expected = tiles.expected(_chat(1), [image])
    for given in (path, path.read_bytes(), np.asarray(image)):
        assert tiles.model.generate(_chat(1), images=[given], max_new_tokens=_NEW) == expected


def test_wrong_numbers_of_images_are_refused(tiles: Whole) -> None:
    image = drawn_image(30, 30)
    with pytest.raises(ServingError, match="the chat has 2 places for images, and 1 were given"):
        tiles.model.generate(_chat(2), images=[image])
    with pytest.raises(ServingError, match="one placeholder for each"):
        tiles.model.generate("no place", images=[image])
    with pytest.raises(ServingError, match="images has to be a list of 2"):
        tiles.model.generate([_chat(1), "text"], images=[[image]])
    with pytest.raises(ServingError, match="input_ids has no effect: images are given with prompts"):
        tiles.model.generate(input_ids=[[5]], images=[image])


@pytest.mark.parametrize("method", ["lora", "gralora"])
def test_adapters_of_tower_projector_and_decoder_are_chosen_by_row(method: str, tmp_path: Path) -> None:
    """PEFT's model is the oracle, its tower adapted too; a row beside it runs the base."""
    name = _QWEN if method == "lora" else _IDEFICS
    targets = (
        ["q_proj", "qkv", "up_proj"] if method == "lora" else ["q_proj", "fc1", "connector.modality_projection.proj"]
    )
    source = tiny_image_model(name, **_SIZES).eval()
    adapted = peft.get_peft_model(tiny_image_model(name, **_SIZES).eval(), _config(method, targets)).eval()
    torch.manual_seed(3)
    for key, value in adapted.named_parameters():
        if "lora" in key:
            torch.nn.init.normal_(value.data, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    model = GraloraModel.from_pretrained(
        trace(source, task="image-text-to-text-with-past"), tmp_path / "adapter", adapter_name="own"
    )
    image, chat = [drawn_image(70, 50)], _chat(1)
    processor = tiny_processor(source)
    export_onnx(model, tmp_path / "data", tokenizer=processor, adapters="data")
    whole = Whole(load(tmp_path / "data"), adapted, AutoProcessor.from_pretrained(tmp_path / "data"))
    with_adapter, base = whole.expected(chat, image), whole._replace(source=source).expected(chat, image)
    assert with_adapter != base
    found = whole.model.generate(
        [chat, chat, "text"], images=[image, image, None], adapter=["own", None, "own"], max_new_tokens=_NEW
    )
    assert found[:2] == [with_adapter, base]
    export_onnx(model, tmp_path / "merged", tokenizer=processor)
    assert load(tmp_path / "merged").generate(chat, images=image, max_new_tokens=_NEW) == with_adapter


def test_a_dora_adapter_and_a_projector_of_its_own_are_merged_and_data(tmp_path: Path) -> None:
    """As `modules_to_save` of PEFT has the projector."""
    name = "LlavaForConditionalGeneration"
    targets = r".*(language_model.*q_proj|layers\.0\.mlp\.fc1)"  # the tower's last layer makes no feature
    config = peft.LoraConfig(r=4, use_dora=True, modules_to_save=["multi_modal_projector"], target_modules=targets)
    source = tiny_image_model(name, **_SIZES).eval()
    adapted = peft.get_peft_model(tiny_image_model(name, **_SIZES).eval(), config).eval()
    torch.manual_seed(3)
    for key, value in adapted.named_parameters():
        if "lora_A" in key or "lora_B" in key or "modules_to_save" in key:
            torch.nn.init.normal_(value.data, std=0.3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    model = GraloraModel.from_pretrained(trace(source, task="image-text-to-text-with-past"), tmp_path / "adapter")
    processor, image, chat = tiny_processor(source), [drawn_image(70, 50)], _chat(1)
    export_onnx(model, tmp_path / "export", tokenizer=processor)
    whole = Whole(load(tmp_path / "export"), adapted, AutoProcessor.from_pretrained(tmp_path / "export"))
    answer, base = whole.expected(chat, image), whole._replace(source=source).expected(chat, image)
    assert answer != base
    assert whole.model.generate(chat, images=image, max_new_tokens=_NEW) == answer
    export_onnx(model, tmp_path / "data", tokenizer=processor, adapters="data")
    found = load(tmp_path / "data").generate(
        [chat] * 2, images=[image] * 2, adapter=["default", None], max_new_tokens=_NEW
    )
    assert found == [answer, base]


def _config(method: str, targets: list[str]) -> Any:
    if method == "lora":
        return peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets)
    return peft.GraloraConfig(r=8, gralora_k=2, alpha=32, target_modules=targets)


def test_a_second_turn_takes_over_what_was_read_of_the_image(tiles: Whole) -> None:
    """The prefix of another image of the same size is never taken for it, nor that of text."""
    prompts = tiles.model.generation.given_prompts
    assert prompts is not None
    decoder = tiles.model.decoder(rows=2, prefix_cache=2**24)
    one, other = drawn_image(70, 50), drawn_image(70, 50, seed=5)
    answers = {}
    for name, image in (("first", one), ("again", one), ("other", other)):
        ids, given = prompts.read_one(_chat(1, "A long question about what is in the picture?"), [image], None)
        row = decoder.open(None, given)
        filled = decoder.fill(row, ids)
        parts = [ids[start : start + 64] for start in range(filled, len(ids), 64)]
        *_, last = [decoder.step({row: part}) for part in parts]
        answers[name] = (filled, last[row])
        decoder.close(row)
    assert answers["first"][0] == 0
    assert answers["again"][0] == len(ids) - 2
    place = ids.index(tiles.model.config["image_token_id"])
    assert answers["other"][0] <= place
    assert np.array_equal(answers["again"][1], answers["first"][1])
    assert not np.array_equal(answers["other"][1], answers["first"][1])
