"""Recordings over HTTP, with OpenAI's client: transcriptions, translations, streams, adapters, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from running_service import running
from starlette.testclient import TestClient
from tiny_speech import END, features, processor, sound, tiny_whisper, traced_whisper, wav
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.speech.recordings import read_audio
from gralora_fx.service.app import create_app
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone
TASK = "automatic-speech-recognition-with-past"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "whisper"
    config = GraloraConfig(r=4, gralora_k=2, alpha=64, init_weights=False, target_modules="all-linear")
    adapted = rewrite(trace(tiny_whisper(), task=TASK), config, adapter_name="tuned")
    export_onnx(adapted, path, adapters="data", tokenizer=processor(), verify=False)
    return path


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return tiny_whisper()


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[tuple[str, Any]]:
    """Yield the address, which ends in a slash, and the app."""
    with running(ServiceSettings(export, max_batch=3, max_queue=8, max_body=200_000)) as served:
        yield served


def heard(seed: int) -> Any:
    """Return a recording as a file holds it, rounded to 16 bits."""
    return read_audio(wav(sound(seed)), 30).samples


def expected(model: PreTrainedModel, seed: int, **options: Any) -> str:
    tokens = model.generate(features(heard(seed)), task=options.pop("task", "transcribe"), **options)[0].tolist()
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return str(processor().decode(tokens, skip_special_tokens=True)).strip()


@pytest.mark.quick
def test_a_recording_is_transcribed_as_transformers_does(client: openai.OpenAI, source: PreTrainedModel) -> None:
    found = client.audio.transcriptions.create(model="whisper", file=("a.wav", wav(sound(1))))
    assert found.text == expected(source, 1)
    assert found.usage is not None
    assert found.usage.model_dump() == {"type": "duration", "seconds": 0.8}


def test_language_prompt_and_translations(client: openai.OpenAI, http: TestClient, source: PreTrainedModel) -> None:
    create = client.audio.transcriptions.create
    file = ("a.wav", wav(sound(2)))
    assert create(model="whisper", file=file, language="de").text == expected(source, 2, language="de")
    prompt = processor().get_prompt_ids("Once", return_tensors="pt")
    tokens = source.generate(features(heard(2)), task="transcribe", language="en", prompt_ids=prompt)[0].tolist()
    tokens = [token for token in tokens if token != END]
    tokens = tokens[len(prompt) :] if tokens[: len(prompt)] == prompt.tolist() else tokens
    text = processor().decode(tokens, skip_special_tokens=True).strip()
    assert create(model="whisper", file=file, language="en", prompt="Once").text == text
    address = "/v1/audio/translations"  # which the client calls deprecated
    found = http.post(address, data={"model": "whisper"}, files={"file": file}).json()
    assert found["text"] == expected(source, 2, task="translate")


def test_text_and_streams_are_the_same_answer(client: openai.OpenAI, source: PreTrainedModel) -> None:
    create, file = client.audio.transcriptions.create, ("a.wav", wav(sound(3)))
    whole = expected(source, 3)
    assert create(model="whisper", file=file, response_format="text") == f"{whole}\n"
    events = list(create(model="whisper", file=file, stream=True))
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert "".join(event.delta for event in events[:-1]) == whole  # type: ignore[union-attr]
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == whole
    assert len(events) > 3


def test_an_adapter_is_named_as_a_model_and_draws_have_a_seed(client: openai.OpenAI, export: Path) -> None:
    create, file = client.audio.transcriptions.create, ("a.wav", wav(sound(4)))
    model = load(export)
    options: dict[str, Any] = {"language": "en", "task": "transcribe"}
    tuned = create(model="tuned", file=file, language="en").text
    assert tuned == model.generate(heard(4), adapter="tuned", **options).strip()
    assert tuned != create(model="whisper", file=file, language="en").text
    more: Any = {"seed": 5, "max_completion_tokens": 6}
    drawn = create(model="whisper", file=file, language="en", temperature=1.2, extra_body=more).text
    sampling: Any = {"do_sample": True, "temperature": 1.2, "top_k": 0, "seed": 5, "max_new_tokens": 6}
    assert drawn == model.generate(heard(4), **options, **sampling).strip()


def test_recordings_that_come_together_are_answered_as_each_alone(client: openai.OpenAI, source: Any) -> None:
    def ask(seed: int) -> str:
        return client.audio.transcriptions.create(model="whisper", file=("a.wav", wav(sound(seed)))).text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [expected(source, seed) for seed in range(8)]


@pytest.mark.parametrize(
    ("data", "fields", "status", "message"),
    [
        (b"", {}, 400, "the audio file is empty"),
        (b"no audio at all", {}, 400, "not WAV|not audio that can be read"),
        (wav(np.zeros(0)), {}, 400, "the audio has no samples"),
        (wav(sound(seconds=1.5)), {}, 400, "the audio is 1.5 seconds long, and the model reads 1 at a time"),
        (wav(sound()), {"language": "fr"}, 400, "no language 'fr'; there is de, en"),
        (wav(sound()), {"response_format": "verbose_json"}, 400, "needs timestamps, which are not supported; use json"),
        (wav(sound()), {"model": "other"}, 404, "no model 'other'"),
        (wav(sound()), {"prompt": "<|en|>"}, 400, "the tokenizer does not take the prompt"),
        (wav(sound()), {"temperature": "3"}, 400, "temperature: Input should be less than or equal to 2"),
        (wav(sound()), {"include[]": "logprobs"}, 400, "is not supported; leave it out"),
        (wav(sound()), {"max_completion_tokens": "400"}, 400, "beyond the context of 32 tokens"),
        (wav(np.zeros(200_000)), {}, 413, "more than the 200000 bytes"),
    ],
)
def test_what_cannot_be_transcribed_is_said(
    http: TestClient, data: bytes, fields: dict[str, str], status: int, message: str
) -> None:
    given = {"model": "whisper", **fields}
    answer = http.post("/v1/audio/transcriptions", data=given, files={"file": ("a.wav", data)})
    assert answer.status_code == status
    assert any(part in answer.json()["error"]["message"] for part in message.split("|"))


def test_other_bodies_and_routes_are_refused(http: TestClient) -> None:
    address = "/v1/audio/transcriptions"
    answer = http.post(address, json={"model": "whisper", "file": "a.wav"})
    assert (answer.status_code, "send the file" in answer.text) == (400, True)
    answer = http.post(address, content=b"--x\r\nbroken", headers={"Content-Type": "multipart/form-data; boundary=y"})
    assert answer.status_code == 400
    answer = http.post("/v1/completions", json={"model": "whisper", "prompt": "a"})
    assert (answer.status_code, "/openapi.json lists the paths" in answer.text) == (404, True)


def test_the_service_describes_itself(http: TestClient) -> None:
    info = http.get("/info").json()
    assert (info["task"], info["context_length"], info["chat_template"]) == (TASK, None, False)
    paths = http.get("/openapi.json").json()["paths"]
    content = paths["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    form = content["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "model"]
    assert form["properties"]["file"]["format"] == "binary"
    assert {"language", "prompt", "response_format", "temperature", "stream"} <= set(form["properties"])
    assert "gralora_fx_time_to_first_token_seconds" in http.get("/metrics").text


def test_without_a_processor_nothing_is_served(tmp_path: Path) -> None:
    export_onnx(traced_whisper(), tmp_path / "bare", verify=False)
    with pytest.raises(ServingError, match="holds no tokenizer"):
        create_app(ServiceSettings(tmp_path / "bare"))
    export_onnx(traced_whisper(), tmp_path / "half", tokenizer=processor().tokenizer, verify=False)
    with pytest.raises(ServingError, match=r"holds no preprocessor_config\.json"):
        create_app(ServiceSettings(tmp_path / "half"))
    with pytest.raises(ServingError, match="chunk has no effect"):
        create_app(ServiceSettings(tmp_path / "half", chunk=8))
