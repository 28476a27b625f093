"""`generate` of models of speech: recordings and features, with transformers' `generate` as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_speech import END, RATE, VOCABULARY, features, processor, sound, tiny_whisper, traced_whisper, whisper_export
from tiny_tokenizers import tiny_tokenizer
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.speech.recordings import Audio
from gralora_fx.run.model import OrtModel
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SPEECH = "automatic-speech-recognition-with-past"


@pytest.fixture(scope="module")
def whisper() -> tuple[OrtModel, PreTrainedModel]:
    return load(whisper_export()), tiny_whisper()


def test_recordings_are_written_down_as_transformers_does(whisper: tuple[OrtModel, PreTrainedModel]) -> None:
    model, source = whisper
    sounds = [sound(seed) for seed in range(3)]
    expected = [source.generate(features(one))[0].tolist() for one in sounds]
    expected = [tokens[: tokens.index(END)] if END in tokens else tokens for tokens in expected]
    texts = [processor().decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert model.generate(sounds[0]) == texts[0]
    assert model.generate(sounds) == texts
    assert model.generate(torch.from_numpy(np.stack(sounds))) == texts
    assert model.generate({"array": sounds[1], "sampling_rate": RATE}) == texts[1]
    assert model.generate(input_features=torch.cat([features(one) for one in sounds])) == expected
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    "options", [{"language": "de"}, {"language": "english", "task": "translate"}, {"max_new_tokens": 4}]
)
def test_language_task_and_length_of_a_recording(whisper: tuple[OrtModel, PreTrainedModel], options: Any) -> None:
    model, source = whisper
    expected = source.generate(features(sound(5)), **options)[0].tolist()
    (found,) = model.generate(input_features=features(sound(5)), **options)
    assert found == (expected[: expected.index(END)] if END in expected else expected)


def test_a_recording_at_another_rate_is_resampled(whisper: tuple[OrtModel, PreTrainedModel]) -> None:
    model, _ = whisper
    high = sound(rate=48_000)
    found = model.generate({"array": high, "sampling_rate": 48_000}, language="en")
    assert found == model.generate(Audio(high, 48_000).at(RATE), language="en")
    assert found != model.generate(high[:RATE], language="en")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("text", {}, "reads sound, not text"),
        (np.zeros((200, 2), np.float32), {}, r"shape \[200, 2\]; give the samples of one channel"),
        (np.zeros(20, np.int16), {}, "reads sound, not text; give a recording as an array of floats"),
        ([1, 2, 3], {}, "reads sound, not text"),
        (["a", "b"], {}, "reads sound, not text"),
        ([], {}, "there is no recording"),
        (None, {}, "give either recordings, as arrays of samples, or input_features"),
        (None, {"input_ids": [[1]]}, "reads sound, not text"),
        (sound(), {"input_features": np.zeros((1, 8, 40))}, "give either recordings"),
        (sound(), {"attention_mask": [[1]]}, "attention_mask is given without input_features"),
        (None, {"input_features": np.zeros((1, 8, 41))}, r"shape \[1, 8, 41\], but the model takes"),
        (None, {"input_features": np.zeros((8, 40))}, r"shape \[8, 40\], but the model takes"),
        (sound(seconds=1.1), {}, r"the audio is 1\.1 seconds long, and the model reads 1 at a time"),
        (np.zeros(0, np.float32), {}, "the audio has no samples"),
        (sound(), {"language": "fr"}, "no language 'fr'; there is de, en"),
        (sound(), {"language": ["de"]}, "language must be a text, but got"),
        (sound(), {"task": "sing"}, "no task 'sing'"),
        (sound(), {"task": [1]}, "task must be a text, but got"),
        (sound(), {"adapter": []}, "adapter has 0 names for 1 rows"),
        (sound(), {"forced_bos_token_id": 3}, "forced_bos_token_id has no effect"),
        (sound(), {"max_new_tokens": 40}, "more than the context of 32"),
    ],
)
def test_what_a_model_of_speech_does_not_take_is_said(
    whisper: tuple[OrtModel, PreTrainedModel], given: Any, options: Any, message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        whisper[0].generate(given, **options)


def test_a_model_of_speech_without_its_processor_takes_features_alone(tmp_path: Path) -> None:
    export_onnx(traced_whisper(), tmp_path / "onnx", verify=False)
    model = load(tmp_path / "onnx")
    (found,) = model.generate(input_features=features(sound()), max_new_tokens=4)
    assert len(found) == 4
    assert max(found) < VOCABULARY
    with pytest.raises(ServingError, match=r"holds no preprocessor_config\.json"):
        model.generate(sound())


def test_a_model_that_reads_samples_themselves_takes_recordings_of_any_length(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "initializer_range": 0.6,
    }
    torch.manual_seed(0)
    model = MoonshineForConditionalGeneration(MoonshineConfig(**{**SPECIAL, **sizes})).eval()
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    whole = Wav2Vec2Processor(extractor, tiny_tokenizer())
    export_onnx(trace(model, task=SPEECH), tmp_path / "onnx", tokenizer=whole, verify=False)
    samples = [sound(seed, seconds=0.4 + 0.3 * seed) for seed in range(2)]
    expected = []
    for one in samples:
        read = extractor(one, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
        tokens = model.generate(**read, max_new_tokens=6, num_beams=1)[0].tolist()[1:]
        expected.append(
            tiny_tokenizer().decode(tokens[: tokens.index(2)] if 2 in tokens else tokens, skip_special_tokens=True)
        )
    served = load(tmp_path / "onnx")
    assert served.generate(samples, max_new_tokens=6) == expected
    with pytest.raises(ServingError, match="language='en' has no effect"):
        served.generate(samples[0], language="en")
