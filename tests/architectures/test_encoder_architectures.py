"""Encoders of many architectures, from trace to a verified export: the sample of `python -m benchmarks encoders`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.encoder_check import check_encoder
from tests.architectures.newer_torch import skip_if_torch_is_too_old
from tests.architectures.tiny_encoders import encoder_classes, skipped_types, task_of, tiny_encoder

# of parts that training alone has, which an export does not
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* was traced in evaluation mode, so training runs without:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* differs in training:UserWarning"),
    pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning"),
]

# class: how many layers of attention it has
FUSED = {
    "AlbertForMaskedLM": 1,
    "BigBirdForMaskedLM": 1,  # its forward makes a layer and throws its weights away
    "BloomForSequenceClassification": 1,  # its heads are folded into the batch, and the bias is part of the product
    "LlamaForSequenceClassification": 1,
    "MBartForSequenceClassification": 3,  # it squeezes axes that it does not name
    "ModernBertForMaskedLM": 2,  # one layer with a window
    "MvpForSequenceClassification": 3,
    "XLMWithLMHeadModel": 1,  # masked_fill hides the keys
    "CLIPForImageClassification": 1,  # a part of its configuration says how large images are
    "Gemma3ForSequenceClassification": 2,  # its configuration alone says whether it returns a cache
    "LayoutLMv3ForSequenceClassification": 1,  # it clamps in place what it reads again
    "LevitForImageClassification": 5,  # its values are wider than its keys
    "T5Gemma2ForTokenClassification": 4,  # its mask is built by vmap
    "CLIPTextModel": 1,  # it pools at the largest token
}
OF_SPEECH = {
    "Wav2Vec2BertForSequenceClassification": 1,  # it takes frames
    "ASTForAudioClassification": 1,  # it takes spectrograms
    "ParakeetEncoder": 1,  # it takes frames, of as many numbers as a spectrogram's
}


@pytest.mark.parametrize("name", [*FUSED])
def test_the_export_gives_the_models_values_and_every_layer_is_fused(tmp_path: Path, name: str) -> None:
    check_fused(name, FUSED[name], tmp_path)


@pytest.mark.parametrize("name", [*OF_SPEECH])
def test_models_that_read_speech_are_exported_likewise(tmp_path: Path, name: str) -> None:
    check_fused(name, OF_SPEECH[name], tmp_path)


def check_fused(name: str, layers: int, folder: Path) -> None:
    skip_if_torch_is_too_old(name)
    task = task_of(name)
    result = check_encoder(tiny_encoder(name), None if task == "audio-classification" else task, folder / "onnx")
    assert (result.difference, result.plain, result.nan_checks) == ("", {}, 0)
    assert result.fused == layers
    assert result.sites > 2


def test_fourier_transforms_hold_for_every_size(tmp_path: Path) -> None:
    result = check_encoder(tiny_encoder("FNetForMaskedLM"), "fill-mask", tmp_path / "onnx")
    assert (result.difference, result.fused) == ("", 0)


def test_attention_that_does_not_fuse_is_exported_as_it_is(tmp_path: Path) -> None:
    result = check_encoder(tiny_encoder("OpenAIGPTForSequenceClassification"), "text-classification", tmp_path / "onnx")
    assert (result.difference, result.fused) == ("", 0)
    assert set(result.plain.values()) == {"its scores are more than queries times keys and what is added to them"}


@pytest.mark.parametrize("name", ["ImageGPTForImageClassification", "OpenAIPrivacyFilterForTokenClassification"])
def test_images_given_as_tokens_and_experts_in_a_loop_are_exported(tmp_path: Path, name: str) -> None:
    result = check_encoder(tiny_encoder(name), task_of(name), tmp_path / "onnx")
    assert result.difference == ""


def test_a_model_that_does_not_run_on_its_tasks_inputs_is_told_from_a_failed_trace(tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(RuntimeError, match="on pixel_values alone the model itself fails"):
        check_encoder(tiny_encoder("VideoMAEModel"), task_of("VideoMAEModel"), tmp_path / "onnx", stages.append)
    assert stages == ["run"]


def test_a_mask_that_hides_all_keys_from_a_query_is_not_fused(tmp_path: Path) -> None:
    name = "DebertaV2ForSequenceClassification"  # its first token may be padding, which attends to nothing
    result = check_encoder(tiny_encoder(name), task_of(name), tmp_path / "onnx")
    assert (result.difference, result.fused) == ("", 0)


def test_the_list_is_transformers_own() -> None:
    tasks = {entry.name: entry.task for entry in encoder_classes()}
    assert {*FUSED, *OF_SPEECH} <= set(tasks)
    assert len(tasks) > 500
    assert {name: task_of(name) for name in FUSED} == {name: tasks[name] for name in FUSED}
    assert "an encoder-decoder" in skipped_types()
