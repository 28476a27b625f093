"""Answers in a form over HTTP: OpenAI's and vLLM's fields, streams, neighbours, clients that go away, bad requests."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from running_service import running
from served_exports import CACHED, adapted, chat_tokenizer
from starlette.testclient import TestClient

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.features.structured_outputs import grammars
from gralora_fx.serving import load

SIZES: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 1024}
WORD = {"type": "string", "maxLength": 6}
SCHEMA = {
    "type": "object",
    "properties": {"name": WORD, "tags": {"type": "array", "items": WORD, "maxItems": 2}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
CHAT: Any = [{"role": "user", "content": "Who?"}]
WITH_DATA = "data"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    model, _ = adapted("llama", folder, CACHED, **SIZES)
    export_onnx(model, folder / WITH_DATA, adapters="data", verify=False, tokenizer=chat_tokenizer())
    return folder / WITH_DATA


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[tuple[str, Any]]:
    with running(ServiceSettings(export, max_batch=4, max_queue=16)) as served:
        yield served


class Cat(BaseModel):
    """One of two kinds, told apart by a member that has a default."""

    kind: Literal["cat"] = "cat"
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    """The other one."""

    kind: Literal["dog", "wolf"]
    photo: Path | None


class Pet(BaseModel):
    """A discriminated union, and formats that are notes."""

    animal: Annotated[Cat | Dog, Field(discriminator="kind")]


class Person(BaseModel):
    """A record of which the official client makes a schema, and as which it reads the answer."""

    model_config = {"extra": "forbid"}

    name: str = Field(max_length=8)
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)


def is_valid(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def test_the_official_client_parses_every_answer(client: openai.OpenAI) -> None:
    for model in ("data", "small", "wide"):
        for seed in range(4):
            found = client.chat.completions.parse(model=model, messages=CHAT, response_format=Person, seed=seed)
            assert found.choices[0].finish_reason == "stop"
            assert isinstance(found.choices[0].message.parsed, Person)
            assert found.usage is not None
            assert found.usage.completion_tokens == len((found.choices[0].message.content or "").encode())


def test_a_discriminated_union_of_pydantic(http: TestClient) -> None:
    body: dict[str, Any] = {"model": "data", "prompt": "a", "max_tokens": 400, "top_p": 0.9}
    kinds = set()
    for seed in range(8):
        sent = {**body, "guided_json": Pet.model_json_schema(), "seed": seed, "temperature": 2}
        choice = http.post("/v1/completions", json=sent).raise_for_status().json()["choices"][0]
        if choice["finish_reason"] == "stop":
            kinds.add(Pet.model_validate_json(choice["text"]).animal.kind)
    assert len(kinds) > 1


def test_streams_several_answers_and_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"model": "wide", "messages": CHAT, "response_format": NAMED, "seed": 5, "temperature": 1.2}
    whole = client.chat.completions.create(**options, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert all(is_valid(text) for text in texts)
    assert len(set(texts)) == 3
    streamed, endings = dict.fromkeys(range(3), ""), {}
    for chunk in client.chat.completions.create(**options, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            endings[choice.index] = choice.finish_reason
    assert list(streamed.values()) == texts
    assert set(endings.values()) == {"stop"}
    scored = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert scored.message.content == texts[0]
    assert b"".join(bytes(token.bytes) for token in scored.logprobs.content) == texts[0].encode()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("field", "expression"),
    [
        ({"response_format": {"type": "text"}}, ".*"),
        ({"response_format": NAMED}, r'\{"name": ".*", "tags": \[.*\]\}'),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"name": ".*", "tags": \[.*\]\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r'\{"name": ".*", "tags": \[.*\]\}'),
        ({"structured_outputs": {"regex": "[a-c]{3}!"}}, "[a-c]{3}!"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "bc"'}}, "a|bc"),
        ({"guided_json": {"enum": ["a", 2]}}, '"a"|2'),
        ({"guided_regex": "[a-c]{3}!"}, "[a-c]{3}!"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "a" | "bc"'}, "a|bc"),
    ],
)
def test_every_field(http: TestClient, path: str, field: dict[str, Any], expression: str) -> None:
    body = {"model": "small", "max_tokens": 300, "seed": 2, **field}
    body |= {"messages": CHAT} if "chat" in path else {"prompt": "Who?"}
    (choice,) = http.post(path, json=body).raise_for_status().json()["choices"]
    assert re.fullmatch(expression, choice["message"]["content"] if "chat" in path else choice["text"], re.DOTALL)
    assert choice["finish_reason"] == "stop" or expression == ".*"


def test_any_object_and_an_answer_that_is_cut(http: TestClient) -> None:
    body = {"model": "data", "prompt": "a", "max_tokens": 5, "temperature": 0}
    for field in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        (choice,) = http.post("/v1/completions", json={**body, **field}).raise_for_status().json()["choices"]
        assert choice["text"].startswith("{")
        assert choice["finish_reason"] == ("stop" if choice["text"].endswith("}") else "length")
    cut = http.post("/v1/completions", json={**body, "guided_choice": ["abcdefgh"]}).json()
    assert (cut["choices"][0]["text"], cut["choices"][0]["finish_reason"]) == ("abcde", "length")
    assert cut["usage"]["completion_tokens"] == 5
    exact = http.post("/v1/completions", json={**body, "guided_choice": ["abcde"]}).json()["choices"][0]
    assert (exact["text"], exact["finish_reason"]) == ("abcde", "stop")
    stopped = http.post("/v1/completions", json={**body, "guided_choice": ["abcde"], "stop": "cd"}).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("ab", "stop")


def test_neighbours_of_grammars_have_the_answers_that_they_have_alone(http: TestClient) -> None:
    """More requests than rows, of every adapter, with forms of their own and without."""
    fields: list[dict[str, Any]] = [
        {},
        {"response_format": NAMED},
        {"guided_choice": ["a long text that is forced", "another long text"]},
        {"structured_outputs": {"regex": "[a-f]{2,40}"}},
    ]
    bodies = [
        {"model": model, "prompt": f"{model} {index}", "max_tokens": 40, "seed": index, "temperature": 1.1, **field}
        for model in ("data", "small", "wide")
        for index, field in enumerate(fields)
    ]

    def answer(body: dict[str, Any]) -> Any:
        return http.post("/v1/completions", json=body).raise_for_status().json()["choices"]

    alone = [answer(body) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(answer, bodies * 2)) == alone * 2


def test_a_client_that_goes_away_frees_its_row(client: openai.OpenAI, service: tuple[str, Any]) -> None:
    queue = service[1].state.engine.queue
    for _ in range(6):
        options: Any = {
            "model": "data",
            "prompt": "a",
            "max_tokens": 900,
            "extra_body": {"guided_regex": "(ab|cd){400}"},
        }
        stream = client.completions.create(**options, stream=True)
        next(iter(stream))
        stream.close()
    end = time.monotonic() + 20
    while queue.running or queue.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    found = client.completions.create(model="data", prompt="a", max_tokens=9, extra_body={"guided_choice": ["yes"]})
    assert found.choices[0].text == "yes"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_go_on_is_an_error_of_its_request(
    http: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """As of an expression that has too many states once some of the answer is there; its neighbour goes on."""
    letters = {str(token): 50.0 for token in chat_tokenizer().convert_tokens_to_ids(["a", "b"])}
    body = {"model": "data", "prompt": "a", "max_tokens": 900, "stream": stream, "logit_bias": letters, "seed": 3}
    monkeypatch.setitem(grammars._LIMITS, "max_lexer_states", 400)
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(http.post, "/v1/completions", json={**body, "stream": False, "guided_regex": "a{60}"})
        found = http.post("/v1/completions", json={**body, "guided_regex": "([ab]*a[ab]{900})+"})
    assert beside.result().json()["choices"][0]["text"] == "a" * 60
    assert found.status_code == (200 if stream else 400), found.text
    events = [line.removeprefix("data: ") for line in found.text.splitlines() if line and "[DONE]" not in line]
    error = json.loads(events[-1])["error"]
    assert (error["code"], error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith("guided_regex: no token continues the answer's grammar (lexer error: too many")
    assert "choosing a token failed: guided_regex: no token" in caplog.text
    assert "Traceback" not in caplog.text


def test_forms_that_are_slow_to_compile_hold_up_nobody_else(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, two are compiled at once, and requests without a form find threads."""
    compiled, running, most = grammars.Grammars.compiled, [0], [0]
    go = threading.Event()

    def slow(grammars: Any, form: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        go.wait(20)
        running[0] -= 1
        return compiled(grammars, form)

    monkeypatch.setattr(grammars.Grammars, "compiled", slow)
    body = {"model": "data", "prompt": "a", "max_tokens": 2}
    with ThreadPoolExecutor(60) as pool:
        try:
            forms = [
                pool.submit(http.post, "/v1/completions", json={**body, "guided_choice": [f"{number}"]})
                for number in range(14)
            ]
            plain = pool.submit(http.post, "/v1/completions", json=body)
            assert plain.result(timeout=10).status_code == 200
            assert not any(form.done() for form in forms)
        finally:
            go.set()
        assert {form.result().status_code for form in forms} == {200}
    assert most[0] <= 2


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown keyword": ({"guided_json": {"foo": 1}}, "guided_json", "the keyword 'foo'"),
    "within a format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format.json_schema.schema",
        "the keyword 'not'",
    ),
    "remote": (
        {"structured_outputs": {"json": {"$ref": "http://a/b"}}},
        "structured_outputs.json",
        "only what is within",
    ),
    "endless": ({"guided_json": {"$ref": "#"}}, "guided_json", "without end"),
    "too complex": ({"guided_regex": "a{1000000}"}, "guided_regex", "too many expressions"),
    "large": ({"guided_json": {"enum": ["x" * 10_000_000]}}, "guided_json", "larger than 64 KiB"),
    "regex": ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
    "grammar": ({"guided_grammar": "start: a"}, "guided_grammar", "unknown name"),
    "no token": ({"guided_regex": ""}, "guided_regex", "no token of the model can begin"),
    "no token later": ({"guided_json": {"const": "\u4e2d"}}, "guided_json", "no token continues the answer's grammar"),
    "choices": ({"guided_choice": []}, "guided_choice", "there are 0 choices"),
    "two": (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "response_format",
        "guided_regex is given too",
    ),
    "two in one": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "given too"),
    "none": ({"structured_outputs": {}}, "structured_outputs", "it has no form"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "it is missing"),
    "idle schema": (
        {"response_format": {**NAMED, "type": "text"}},
        "response_format.json_schema",
        "no effect with type text",
    ),
    "field": ({"structured_outputs": {"json": {}, "zzz": 1}}, "structured_outputs.zzz", "is not supported"),
    "an option": (
        {"structured_outputs": {"json": {}, "whitespace_pattern": ""}},
        "structured_outputs.whitespace_pattern",
        "",
    ),
    "type": ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
    "schema's type": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 3}}},
        "response_format.json_schema.schema",
        "dictionary",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_names_its_field(http: TestClient, name: str) -> None:
    fields, param, message = BAD[name]
    response = http.post("/v1/chat/completions", json={"model": "data", "messages": CHAT, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert len(error["message"]) < 600


def test_answers_are_those_of_python(http: TestClient, export: Path) -> None:
    body = {"model": "wide", "prompt": "a", "max_tokens": 200, "temperature": 1, "seed": 7, "response_format": NAMED}
    found = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    sampling: Any = {"max_new_tokens": 200, "do_sample": True, "top_k": 0, "seed": 7}
    assert load(export).generate("a", adapter="wide", json_schema=SCHEMA, **sampling) == found
