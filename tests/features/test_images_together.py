"""Images beside the rest of an export: its forms and precisions, its adapters, and the ways to give images."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from gralora_fx import GraloraModel, LoraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.errors import ExportError, ServingError, in_command
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.features.images import image_prompts, vision_part
from gralora_fx.serving import OrtModel, load
from tests.architectures.image_prompts import tiny_image_model
from tests.tiny_image_processors import drawn_image, tiny_processor

_SIZES = {"vocab_size": 128, "max_position_embeddings": 512, "num_hidden_layers": 1}
_TASK, _NEW = "image-text-to-text-with-past", 4
_CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def _source() -> Any:
    return tiny_image_model("Idefics3ForConditionalGeneration", **_SIZES).eval()


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    return trace(_source(), task=_TASK)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of an adapter of the tower and the decoder, of another, and of one of the decoder alone."""
    directory = tmp_path_factory.mktemp("adapters")
    for number, (name, targets) in enumerate(
        {"tower": ["q_proj", "fc1"], "other": ["q_proj", "fc1"], "text": r".*text_model\.layers.*q_proj"}.items()
    ):
        adapted = peft.get_peft_model(_source(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets))
        torch.manual_seed(number)
        for key, value in adapted.named_parameters():
            if "lora" in key:
                torch.nn.init.normal_(value.data, std=0.2)
        adapted.save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="module")
def adapted(traced: TracedModel, adapters: Path) -> GraloraModel:
    return GraloraModel.from_pretrained(traced, adapters / "tower", adapter_name="tower")


@pytest.fixture(scope="module")
def inputs(adapted: GraloraModel, tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    directory = tmp_path_factory.mktemp("inputs") / "export"
    report = export_onnx(adapted, directory, adapters="inputs", tokenizer=tiny_processor(_source()), verify="quick")
    assert report.verification is not None
    assert report.verification.passed
    return load(directory)


def _answer(model: OrtModel, **given: Any) -> Any:
    return model.generate(_CHAT, images=[drawn_image(70, 50)], max_new_tokens=_NEW, **given)


def test_what_reads_pixels_takes_adapters_as_inputs(inputs: OrtModel) -> None:
    """Also it takes all tensors of them in a run of the base."""
    assert _answer(inputs) != _answer(inputs, adapter="tower")


@pytest.mark.usefixtures("own_garbage")
def test_features_are_kept_by_the_adapter_that_reads_pixels(
    inputs: OrtModel, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base and an adapter of the text alone share them; one that is unloaded is not held, nor taken for another."""
    runs: list[Any] = []
    run = image_prompts.run_arrays
    monkeypatch.setattr(image_prompts, "run_arrays", lambda *args: runs.append(args) or run(*args))

    def count(adapter: str | None) -> int:
        before = len(runs)
        _answer(inputs, adapter=adapter)
        return len(runs) - before

    count(None)
    inputs.load_adapter("text", export_adapter(adapters / "text", inputs.directory, "saved-text"))
    assert [count(None), count("text")] == [0, 0]
    inputs.load_adapter("own", export_adapter(adapters / "tower", inputs.directory, "saved-tower"))
    assert count("own") > 0
    assert count("own") == 0
    with_first = _answer(inputs, adapter="own")
    loaded = weakref.ref(inputs.adapters["own"])
    inputs.unload_adapter("own")
    gc.collect()
    assert loaded() is None
    inputs.load_adapter("own", export_adapter(adapters / "other", inputs.directory, "saved-other"))
    assert count("own") > 0
    assert _answer(inputs, adapter="own") != with_first


@pytest.mark.parametrize("form", [{"adapters": "data", "precision": "bf16"}, {"quantize": "int8-dynamic"}])
def test_what_reads_pixels_is_compared_in_exports_of_other_forms(
    form: dict[str, Any], adapted: GraloraModel, tmp_path: Path
) -> None:
    """Weights and adapters are rounded each by itself, those of what reads pixels too."""
    report = export_onnx(adapted, tmp_path / "export", verify="quick", **form)
    assert report.verification is not None
    assert report.verification.companions is not None
    assert report.verification.companions.agreement == 1.0


def test_features_of_a_bfloat16_model_are_compared_as_they_are(tmp_path: Path) -> None:
    model = trace(_source().to(torch.bfloat16), task=_TASK)
    report = export_onnx(model, tmp_path / "export", verify="quick")
    assert report.verification is not None
    assert report.verification.passed


def test_a_prompt_in_a_list_may_have_an_image_without_a_list_of_its_own(inputs: OrtModel) -> None:
    image = drawn_image(70, 50)
    assert inputs.generate([_CHAT], images=[image], max_new_tokens=_NEW) == [_answer(inputs)]
    assert inputs.generate(_CHAT, images=image, max_new_tokens=_NEW) == _answer(inputs)


def test_a_place_without_its_image_is_refused(inputs: OrtModel) -> None:
    for prompts in (_CHAT, ["text", _CHAT]):
        with pytest.raises(ServingError, match="the chat has 1 places for images, and 0 were given"):
            inputs.generate(prompts)


def test_a_tower_is_traced_once_for_an_export_and_its_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with an adapter, which an export folds; and LLaVA's tower is called without its values, once merged."""
    source = tiny_image_model("LlavaForConditionalGeneration", num_hidden_layers=2).train()
    config = LoraConfig(r=2, target_modules=r".*layers\.0\.self_attn\.q_proj", init_lora_weights=False)
    model = rewrite(trace(source, task=_TASK), config)
    made: list[Any] = []
    of_model = vision_part.form_of
    monkeypatch.setattr(vision_part, "form_of", lambda source: made.append(source) or of_model(source))
    report = export_onnx(model.eval(), tmp_path / "merged", verify="quick")
    assert report.verification is not None
    assert report.verification.companions is not None
    assert made == [source]
    assert source.training  # as it was
    report = export_onnx(merge(model), tmp_path / "after", verify="quick")
    assert report.verification is not None
    assert report.verification.companions is not None
    pixels = torch.randn(2, 3, 32, 32)
    merged, after = (load(tmp_path / name).companion_session("vision_encoder") for name in ("merged", "after"))
    feed = {"pixel_values": pixels.numpy()}
    assert np.allclose(merged.run(None, feed)[0], after.run(None, feed)[0], atol=1e-5)


_TOWERS = {
    "the part that reads pixels cannot be traced": lambda pixels: (
        pixels * (1 if float(pixels.detach().sum()) > 0 else 2)
    ),
    "vision_encoder.onnx cannot be made": torch.special.bessel_j0,
}


@pytest.mark.parametrize("reason", _TOWERS)
def test_what_cannot_be_compared_is_refused_unless_nothing_is_verified(reason: str, tmp_path: Path) -> None:
    """The decoder alone would take embeddings of images that nothing compared."""
    source = tiny_image_model("LlavaForConditionalGeneration", num_hidden_layers=1).eval()
    tower = source.model.vision_tower
    forward = tower.forward
    tower.forward = lambda pixel_values, **options: forward(_TOWERS[reason](pixel_values), **options)
    model = trace(source, task=_TASK)
    with pytest.raises(ExportError, match=reason) as refused:
        export_onnx(model, tmp_path / "export")
    text = in_command(refused.value)
    assert "--no-verify" in text
    assert "--task text-generation-with-past" in text
    assert not (tmp_path / "export").exists()
    with pytest.warns(UserWarning, match=reason):
        export_onnx(model, tmp_path / "export", verify=False)
    assert not (tmp_path / "export" / "vision_encoder.onnx").exists()
