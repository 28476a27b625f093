"""The prompt of a decoder of speech: with it the tokens are those of Whisper's `generate`, by every option."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_speech import (
    END,
    LETTERS,
    RATE,
    RULES,
    SPECIAL,
    START,
    features,
    processor,
    sound,
    tiny_whisper,
    traced_whisper,
    whisper_export,
)
from traces import fresh

from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.speech.recordings import Audio, SpeechReader, recording
from gralora_fx.features.speech.speech_inputs import SpeechPrompt, earlier_text
from gralora_fx.run.generate.answer_options import Sampling
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.prompts import is_signal
from gralora_fx.run.generate.token_choice import TokenChooser
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone


@pytest.fixture(scope="module")
def export() -> Path:
    return whisper_export()


def rules_of(**fields: Any) -> GenerationRules:
    return GenerationRules(Path("onnx"), {**RULES, **fields}, frozenset({END}))


@functools.cache
def model() -> Any:
    return tiny_whisper()


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({}, {"language": "de"}),
        ({}, {"language": "German", "task": "translate"}),
        ({}, {"task": "transcribe"}),
        ({"language": "<|en|>", "task": "translate"}, {}),
        ({"language": "en"}, {"language": "de"}),
        ({"forced_decoder_ids": [[1, None], [2, SPECIAL["<|translate|>"]]]}, {}),
        ({"forced_decoder_ids": [[1, SPECIAL["<|de|>"]], [2, SPECIAL["<|transcribe|>"]]]}, {}),
        ({"forced_decoder_ids": [[1, SPECIAL["<|de|>"]], [2, SPECIAL["<|transcribe|>"]]]}, {"language": "en"}),
        ({"forced_decoder_ids": [[1, SPECIAL["<|notimestamps|>"]]], "is_multilingual": False, "lang_to_id": None}, {}),
        ({}, {"language": "en", "prompt": "Once more"}),
        ({}, {"prompt": "and on"}),
    ],
)
def test_tokens_are_those_of_whispers_generate(export: Path, fields: dict[str, Any], options: dict[str, Any]) -> None:
    source = model()
    kept = {**RULES, **fields}
    source.generation_config = transformers.GenerationConfig(**{k: v for k, v in kept.items() if v is not None})
    given = dict(options)
    earlier: tuple[int, ...] = ()
    if "prompt" in given:
        text = given.pop("prompt")
        earlier = earlier_text(processor().tokenizer, text, 32)
        given["prompt_ids"] = torch.from_numpy(processor().get_prompt_ids(text, return_tensors="np"))
        assert list(earlier) == given["prompt_ids"].tolist()
    read = features(sound(3))
    expected = source.generate(read, max_new_tokens=8, **given)[0].tolist()
    rules = GenerationRules(export, source.generation_config.to_dict(), frozenset({END}))
    given.pop("prompt_ids", None)
    prompt = SpeechPrompt(rules, **given, earlier=earlier)
    engine = load(export).decoder()
    features_read = {"input_features": read.numpy()}
    heard = None
    if languages := prompt.languages:
        row = engine.open(None, features_read)
        logits = engine.step({row: [START]})[row]
        engine.close(row)
        heard = max(languages, key=lambda token: logits[token])
    tokens = prompt.tokens(heard)
    row, answer = engine.open(None, features_read), []
    choose = TokenChooser(Sampling(), tokens, rules.ends, rules.processors(Sampling(), tokens, 8))
    given_tokens = tokens
    while len(answer) < 8:
        answer.append(choose(engine.step({row: given_tokens})[row]).token)
        given_tokens = answer[-1:]
    skipped = len(earlier) if len(expected) > 8 else 0
    assert expected[skipped:] == answer
    assert len(set(answer)) > 1


@pytest.mark.quick
def test_a_prompt_is_the_start_the_language_the_task_and_no_timestamps() -> None:
    prompt = SpeechPrompt(rules_of(), language="German", task="translate", earlier=(101, 7))
    assert not prompt.languages
    names = ("<|de|>", "<|translate|>", "<|notimestamps|>")
    assert prompt.tokens() == [101, 7, START, *(SPECIAL[name] for name in names)]
    assert SpeechPrompt(rules_of()).languages == [SPECIAL["<|en|>"], SPECIAL["<|de|>"]]


def test_earlier_text_is_cut_at_its_beginning() -> None:
    tokens = earlier_text(processor().tokenizer, "abcdefghijklmnopqrstuvwxyz", 32)
    assert tokens == (SPECIAL["<|startofprev|>"], *(LETTERS.index(letter) for letter in "lmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"language": "Klingon"}, "no language 'Klingon'; there is en, de"),
        ({}, {"language": "fr"}, "no language 'fr'; there is en, de"),
        ({}, {"task": "sing"}, "no task 'sing'; there is transcribe, translate"),
        ({"is_multilingual": False}, {"language": "en"}, "the model knows only English"),
        ({"lang_to_id": None}, {"language": "en"}, "has no lang_to_id"),
        ({"task_to_id": None}, {"task": "translate"}, "has no task_to_id"),
        ({"language": "fr"}, {}, "no language 'fr'; there is en, de"),
        ({"task": "sing"}, {}, "no task 'sing'; there is transcribe, translate"),
        ({"task": "translate", "task_to_id": None}, {}, "no task 'translate'; there is none"),
        ({"lang_to_id": ["en"]}, {}, r"lang_to_id of onnx is \['en'\], not ids of tokens"),
        ({"lang_to_id": {"<|en|>": "x"}}, {}, "lang_to_id of onnx is"),
        ({"forced_decoder_ids": [[2, 5]]}, {}, r"forced_decoder_ids of onnx is \[\[2, 5\]\], not the tokens of places"),
        ({"forced_decoder_ids": [[1, "x"]]}, {}, "not the tokens of places 1, 2"),
        ({"forced_decoder_ids": [7]}, {}, "not the tokens of places 1, 2"),
    ],
)
def test_what_the_model_does_not_speak_is_said(fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        SpeechPrompt(rules_of(**fields), **options)


@pytest.mark.parametrize("text", ["<|en|>", "and <|notimestamps|> so"])
def test_special_tokens_are_not_earlier_text(text: str) -> None:
    with pytest.raises(ServingError, match="the tokenizer does not take the prompt"):
        earlier_text(processor().tokenizer, text, 32)


def test_a_recording_is_read_as_the_processor_reads_it(export: Path) -> None:
    session: Any = load(export).session
    reader = SpeechReader(export, {value.name: value for value in session.encoder.get_inputs()})
    assert (reader.rate, reader.most_seconds) == (RATE, 1.0)
    for value in (sound(), torch.from_numpy(sound()), {"array": sound(), "sampling_rate": RATE}, sound().tolist()):
        assert is_signal(value)
        found = reader.features(recording(value, reader.rate))
        assert list(found) == ["input_features"]
        assert np.allclose(found["input_features"], features(sound()).numpy(), atol=1e-5)
    with pytest.raises(ServingError, match=r"the audio is 1\.2 seconds long, and the model reads 1 at a time"):
        reader.features(Audio(sound(seconds=1.2), RATE))


@pytest.mark.parametrize("value", ["text", [1, 2, 3], np.zeros((2, 3)), np.arange(4), {"array": [0.5]}, None, []])
def test_what_is_not_a_recording(value: Any) -> None:
    assert not is_signal(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"array": np.zeros((2, 9), np.float32), "sampling_rate": RATE}, r"shape \[2, 9\]; give the samples of one"),
        ({"array": np.arange(9), "sampling_rate": RATE}, "samples are int64; give floats"),
        ({"array": sound(), "sampling_rate": 1.5}, "sampling_rate must be a whole number"),
        ({"array": sound(), "sampling_rate": 0}, "sampling rate is 0 Hz"),
        ({"array": object(), "sampling_rate": RATE}, "not an array of samples"),
        (np.full(5, np.inf, np.float32), "not finite numbers"),
    ],
)
def test_what_a_recording_cannot_be_is_said(value: Any, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        recording(value, RATE)


def test_an_export_without_a_processor_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"holds no preprocessor_config\.json"):
        SpeechReader(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ServingError, match=r"cannot be loaded from preprocessor_config\.json"):
        SpeechReader(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(ServingError, match="cannot be read as JSON"):
        SpeechReader(tmp_path, {})


@pytest.mark.parametrize("form", ["directory", "tokenizer"])
def test_the_feature_extractor_beside_a_tokenizer_is_exported_too(tmp_path: Path, form: str) -> None:
    processor().save_pretrained(tmp_path / "model")
    given: Any = tmp_path / "model"
    if form == "tokenizer":
        given = transformers.AutoTokenizer.from_pretrained(given)
    export_onnx(traced_whisper(), tmp_path / "onnx", tokenizer=given, verify=False)
    session: Any = load(tmp_path / "onnx").session
    reader = SpeechReader(tmp_path / "onnx", {value.name: value for value in session.encoder.get_inputs()})
    assert reader.features(Audio(sound(), RATE))["input_features"].shape == (1, 8, 40)


def test_a_damaged_feature_extractor_is_not_exported(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ExportError, match=r"preprocessor_config\.json cannot be read as JSON"):
        export_onnx(traced_whisper(), tmp_path / "onnx", tokenizer=tmp_path / "model", verify=False)
    assert not (tmp_path / "onnx").exists()


def test_a_model_of_text_has_no_feature_extractor_to_export(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path / "model")
    traced = fresh("t5", task="text2text-generation-with-past", num_layers=1)[1]
    export_onnx(traced, tmp_path / "onnx", tokenizer=tmp_path / "model", verify=False)
    assert not (tmp_path / "onnx" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("length", [6, 11, 32, None])
def test_the_length_of_an_answer_is_that_of_whispers_generate(export: Path, length: int | None) -> None:
    source = model()
    source.generation_config = transformers.GenerationConfig(**{**RULES, "max_length": length, "eos_token_id": 60})
    expected = source.generate(features(sound(8)), language="de")[0].tolist()
    inputs = load(export).encoder_inputs
    assert inputs is not None
    rules = dataclasses.replace(inputs.rules, config=source.generation_config.to_dict(), ends=frozenset({60}))
    tokens = SpeechPrompt(rules, "de").tokens()
    most = rules.new_tokens(len(tokens))
    assert min(most or 20, 32 - len(tokens)) == len(expected)  # 20 where nothing is said, by transformers alone


def test_of_text_before_a_recording_the_end_is_tokenized(read: list[int]) -> None:
    tokenizer = processor().tokenizer
    words = " ".join(f"word{number}" for number in range(20_000))
    expected = tokenizer.get_prompt_ids(words, return_tensors="np").tolist()
    read.clear()
    found = earlier_text(tokenizer, words, 448)
    assert found == (expected[0], *expected[-223:])
    assert max(read) < 100_000
    unbroken = "a" * 10_000  # is tokenized whole, since no cut is sure
    assert len(earlier_text(tokenizer, unbroken, 448)) == 224
