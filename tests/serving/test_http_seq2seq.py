"""Encoder-decoders of text over HTTP: completions and chats, whose answers are transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from running_service import running
from served_exports import chat_tokenizer
from starlette.testclient import TestClient
from tiny_models import WIDE
from tiny_tokenizers import tiny_tokenizer
from traces import fresh

from gralora_fx import GraloraConfig, rewrite
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone
TASK = "text2text-generation-with-past"
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TEXTS = ["a first text", "b", "and one that is much longer than the others"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    traced = fresh("bart", task=TASK, **SPECIAL, **WIDE["bart"])[1]
    traced.generation_config.no_repeat_ngram_size = 2
    adapted = rewrite(traced, GraloraConfig(r=4, gralora_k=2, alpha=16, init_weights=False), adapter_name="tuned")
    adapted.save_pretrained(folder / "adapter", ["tuned"])
    export_onnx(adapted, folder / "bart", adapters="data", tokenizer=chat_tokenizer(), verify=False)
    return folder / "bart"


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[tuple[str, Any]]:
    """Yield the address, which ends in a slash, and the app."""
    with running(ServiceSettings(export, max_batch=3, max_queue=16, adapter_root=export.parent)) as served:
        yield served


def expected(text: str, count: int) -> str:
    """Generate with transformers, by the model's own rules."""
    source = fresh("bart", task=TASK, **SPECIAL, **WIDE["bart"])[0]
    source.generation_config.no_repeat_ngram_size = 2
    inputs = tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
    tokens = source.generate(**inputs, max_new_tokens=count, num_beams=1)[0].tolist()[1:]
    tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
    return str(tiny_tokenizer().decode(tokens, skip_special_tokens=True))


@pytest.mark.quick
def test_completions_are_what_transformers_generates(client: openai.OpenAI) -> None:
    found = client.completions.create(model="bart", prompt=TEXTS, max_tokens=9, temperature=0)
    assert [choice.text for choice in found.choices] == [expected(text, 9) for text in TEXTS]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS)
    assert len({choice.text for choice in found.choices}) == 3


def test_answers_in_a_form_go_before_the_models_own_rules(client: openai.OpenAI) -> None:
    """No token pair may come twice by the model's rules, and BART forces an end at the most tokens."""
    for choice in ("abababab", "a"):
        options: Any = {"model": "tuned", "prompt": TEXTS, "max_tokens": 9, "extra_body": {"guided_choice": [choice]}}
        found = client.completions.create(**options)
        assert [(each.text, each.finish_reason) for each in found.choices] == [(choice, "stop")] * 3
    options = {
        "model": "bart",
        "prompt": TEXTS[0],
        "max_tokens": 30,
        "n": 3,
        "extra_body": {"guided_regex": "[ab]{12}"},
    }
    assert {len(each.text) for each in client.completions.create(**options).choices} == {12}


def test_streams_draws_and_several_answers(client: openai.OpenAI, export: Path) -> None:
    options: Any = {"model": "bart", "prompt": TEXTS[0], "max_tokens": 8}
    chunks = list(client.completions.create(**options, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(TEXTS[0], 8)
    drawn = client.completions.create(**options, temperature=1.3, seed=4, n=3)
    model = load(export)
    sampling: Any = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3, "top_k": 0}
    assert [choice.text for choice in drawn.choices] == [
        model.generate(TEXTS[0], seed=4 + index, **sampling) for index in range(3)
    ]


def test_chats_go_by_the_template(client: openai.OpenAI, export: Path) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    found = client.chat.completions.create(model="bart", messages=messages, temperature=0, max_tokens=7)
    assert found.choices[0].message.content == load(export).generate(messages, max_new_tokens=7)


def test_requests_that_come_together_have_an_adapter_each(
    client: openai.OpenAI, export: Path, http: TestClient
) -> None:
    def ask(index: int) -> str:
        name, text = ("bart", "tuned", "late")[index % 3], TEXTS[index % 2]
        found = client.completions.create(model=name, prompt=text, max_tokens=8, temperature=0)
        return found.choices[0].text

    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "late", "lora_path": "adapter/tuned"})
    assert loaded.status_code == 200, loaded.text
    model = load(export)
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(ask, range(18)))
    for index, text in enumerate(found):
        adapter = (None, "tuned", "tuned")[index % 3]  # the one that was loaded late is the same
        assert text == model.generate(TEXTS[index % 2], adapter=adapter, max_new_tokens=8)
    assert len(set(found)) > 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"echo": True}, "echo has no effect: an encoder-decoder does not continue its prompt"),
        ({"prompt": "a" * 65}, "the source has 65 tokens, more than the encoder's 64 positions"),
        ({"prompt": ""}, "the source is empty; give a text"),
        ({"prompt": ["a", " "]}, "the source is empty; give a text"),
        ({"prompt": [3, 101]}, "the source holds token 101"),
        ({"max_tokens": 64}, "beyond the context of 64 tokens"),
        ({"model": "other"}, "no model 'other'"),
    ],
)
def test_what_is_not_taken_is_said(http: TestClient, fields: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/completions", json={"model": "bart", "prompt": "a", "temperature": 0, **fields})
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]


def test_recordings_are_not_taken(http: TestClient) -> None:
    answer = http.post("/v1/audio/transcriptions", data={"model": "bart"}, files={"file": b"RIFF"})
    assert answer.status_code == 404
    assert "there is no '/v1/audio/transcriptions' here" in answer.json()["error"]["message"]


def test_the_service_describes_itself(http: TestClient) -> None:
    info = http.get("/info").json()
    assert (info["task"], info["context_length"], info["chat_template"]) == (TASK, 64, True)
    assert http.get("/health").status_code == 200


def test_a_late_adapter_needs_no_model(export: Path) -> None:
    path = export_adapter(export.parent / "adapter" / "tuned", export, "third")
    assert path.is_file()
    assert load(export).generate(TEXTS[0], adapter="third") == load(export).generate(TEXTS[0], adapter="tuned")
