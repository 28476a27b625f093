"""Fields that change no answer are taken and named in a header; what would change it is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentence_encoders import HIDDEN, save_encoder
from served_exports import CACHED, LLAMA, adapted, chat_tokenizer, decoders
from starlette.testclient import TestClient

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.protocols.openai import strict_model
from gralora_fx.service.protocols.openai.requests import ChatRequest, CompletionRequest
from gralora_fx.service.protocols.openai.response_requests import ResponseRequest

MODEL = "data"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
CHAT = {**GREEDY, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
PATHS: dict[str, tuple[str, dict[str, Any], strict_model.Idle]] = {
    "completions": ("/v1/completions", {**GREEDY, "prompt": "a", "max_tokens": 3}, CompletionRequest.without_effect),
    "chats": ("/v1/chat/completions", CHAT, ChatRequest.without_effect),
    "responses": ("/v1/responses", {**GREEDY, "input": "a", "max_output_tokens": 3}, ResponseRequest.without_effect),
    "embeddings": ("/v1/embeddings", {"model": "onnx", "input": "a"}, strict_model.EVERYWHERE),
}
# one of the values that change nothing, where any does
VALUES: dict[str, Any] = {
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "prompt_cache_options": {"mode": "explicit"},
    "prediction": {"type": "content", "content": "b"},
    "parallel_tool_calls": False,
    "max_tool_calls": 3,
}
OPTIONS: dict[str, dict[str, Any]] = {  # of responses, by what the header names
    "reasoning.effort": {"reasoning": {"effort": "low"}},
    "reasoning.summary": {"reasoning": {"summary": "auto"}},
    "text.verbosity": {"text": {"verbosity": "medium"}},
    "include": {"include": ["message.output_text.logprobs", "file_search_call.results"]},
    "stream_options.include_obfuscation": {"stream": True, "stream_options": {"include_obfuscation": True}},
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "verbosity": ("chats", {"verbosity": "low"}, "verbosity"),
    "verbosity of a completion": ("completions", {"verbosity": "high"}, "verbosity"),
    "a prediction of another kind": ("chats", {"prediction": {"type": "b", "content": "b"}}, "prediction.type"),
    "a prediction without content": ("chats", {"prediction": {"type": "content"}}, "prediction.content"),
    "a prediction that is a text": ("chats", {"prediction": "b"}, "prediction"),
    "a prediction of images": (
        "chats",
        {"prediction": {"type": "content", "content": [{"type": "image_url", "text": "b"}]}},
        "prediction.content.0.type",
    ),
    "more in a prediction": ("chats", {"prediction": {"type": "content", "content": "b", "a": 1}}, "prediction.a"),
    "verbosity of text": ("responses", {"text": {"verbosity": "high"}}, "text.verbosity"),
    "truncation": ("responses", {"truncation": "auto"}, "truncation"),
    "background": ("responses", {"background": True}, "background"),
    "earlier": ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
    "audio": ("chats", {"modalities": ["text", "audio"]}, "modalities"),
    "search": ("chats", {"web_search_options": {}}, "web_search_options"),
    "functions": ("chats", {"functions": [{"name": "a"}]}, "functions"),
    "best": ("completions", {"best_of": 3}, "best_of"),
    "suffix": ("completions", {"suffix": "b"}, "suffix"),
    "dimensions": ("embeddings", {"dimensions": HIDDEN // 2}, "dimensions"),
}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder, tokenizer = tmp_path_factory.mktemp("thinking"), chat_tokenizer()
    body = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = f"{body}{{% if enable_thinking is false %}}</think>{{% endif %}}"
    model, _ = adapted("llama", folder, CACHED, **LLAMA)
    export_onnx(model, folder / MODEL, adapters="data", verify=False, tokenizer=tokenizer)
    with TestClient(create_app(ServiceSettings(folder / MODEL, max_batch=2))) as client:
        yield client


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    exports, _ = decoders(tmp_path_factory.mktemp("ignored"), MODEL)
    with TestClient(create_app(ServiceSettings(exports[MODEL], max_batch=2))) as client:
        yield client


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("sentences")
    source = str(save_encoder("bert", folder, "mean"))
    export_onnx(load_traced(source, None, None), folder / "onnx", tokenizer=source, verify=False)
    with TestClient(create_app(ServiceSettings(folder / "onnx"))) as client:
        yield client


@pytest.fixture
def asked(request: pytest.FixtureRequest, name: str) -> Any:
    """Asks a path of this name, with more fields."""
    client: TestClient = request.getfixturevalue("encoder" if name == "embeddings" else "decoder")
    path, body, _ = PATHS[name]
    return lambda **more: client.post(path, json={**body, **more})


def answer(response: Any) -> Any:
    """Return an answer without ids, times and what is sent back of the request."""
    body = response.raise_for_status().json()
    if "output" in body:
        return [content["text"] for item in body["output"] for content in item["content"]], body["usage"]
    return body.get("choices", body.get("data")), body["usage"]["total_tokens"]


@pytest.mark.parametrize("name", PATHS)
def test_each_is_named_and_changes_nothing(name: str, asked: Any) -> None:
    plain = asked()
    assert "x-ignored-fields" not in plain.headers
    table = PATHS[name][2]
    fields = {field: VALUES.get(field, "low") if values is None else values[0] for field, values in table.items()}
    found = asked(**fields, seed=None)  # a null is as if it were left out
    assert answer(found) == answer(plain)
    assert found.headers["x-ignored-fields"].split(", ") == [*fields]
    if name != "embeddings":
        streamed = asked(**fields, stream=True)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["x-ignored-fields"].split(", ") == [*fields]


@pytest.mark.parametrize("name", ["responses"])
def test_so_are_options(asked: Any, name: str) -> None:
    for field, given in OPTIONS.items():
        response = asked(**given)
        assert (response.status_code, response.headers["x-ignored-fields"]) == (200, field)
    assert "x-ignored-fields" not in asked(include=["message.output_text.logprobs"]).headers


@pytest.mark.parametrize("name", ["chats"])
def test_a_prediction_may_be_parts(asked: Any, name: str) -> None:
    found = asked(prediction={"type": "content", "content": [{"type": "text", "text": "b"}]})
    assert answer(found) == answer(asked())
    assert found.headers["x-ignored-fields"] == "prediction"


@pytest.mark.parametrize("name", ["embeddings"])
def test_the_size_of_an_embedding_may_be_said(asked: Any, name: str) -> None:
    assert answer(asked(dimensions=HIDDEN)) == answer(asked())


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_answer_is_refused(request: pytest.FixtureRequest, case: str) -> None:
    name, fields, field = REFUSED[case]
    client: TestClient = request.getfixturevalue("encoder" if name == "embeddings" else "decoder")
    path, body, _ = PATHS[name]
    response = client.post(path, json={**body, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("chats", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("chats", {"reasoning_effort": "none"}, "reasoning_effort"),
        ("responses", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ],
)
def test_a_model_that_reasons_refuses_an_effort(
    thinking: TestClient, name: str, fields: dict[str, Any], field: str
) -> None:
    """Its template decides what the model thinks, which an effort would change."""
    path, body, _ = PATHS[name]
    refused = thinking.post(path, json={**body, **fields})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    thinking.post(path, json=body).raise_for_status()


def test_the_page_lists_them_all() -> None:
    page = Path("docs/http-api.md").read_text(encoding="utf-8")
    table = page[page.index("### Fields without effect") :]
    tables = [kind.without_effect for kind in (CompletionRequest, ChatRequest, ResponseRequest)]
    for field in {*strict_model.OF_REASONING, *OPTIONS, *(field for table in tables for field in table)}:
        assert f"`{field}`" in table, field
