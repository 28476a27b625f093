"""Requests with a great many values that are wrong, or that there is no room for, cost little to refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from served_exports import adapted, chat_tokenizer, decoders
from starlette.testclient import TestClient

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.encoder import TextReader
from gralora_fx.service.protocols.openai import text_requests
from gralora_fx.service.protocols.openai.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
)

MANY = 10_000
TEXT = {"model": "a", "prompt": "a"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"model": "a", "prompt": [*[1] * MANY, "a"]}),
        (CompletionRequest, {"model": "a", "prompt": [["a"] * MANY]}),
        (CompletionRequest, {**TEXT, "stop": [1] * MANY}),
        (CompletionRequest, {**TEXT, "stop_token_ids": ["a"] * MANY}),
        (CompletionRequest, {**TEXT, "logit_bias": {str(token): "a" for token in range(MANY)}}),
        (CompletionRequest, {**TEXT, **dict.fromkeys(map(str, range(MANY)), 0)}),
        (ChatRequest, {"model": "a", "messages": [1] * MANY}),
        (ChatRequest, {"model": "a", "messages": [{"role": "user", "content": [1] * MANY}]}),
        (EmbeddingRequest, {"model": "a", "input": [*["a"] * MANY, 1]}),
        (ClassifyRequest, {"input": [1] * MANY}),
        (RerankRequest, {"query": "a", "documents": [1] * MANY}),
        (RerankRequest, {"query": "a", "documents": ["a"], **dict.fromkeys(map(str, range(MANY)), 0)}),
    ],
)
def test_few_problems_are_described(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() < 10


def test_an_unknown_field_is_refused_beside_those_without_effect() -> None:
    for fields in ({"tools": [1]}, {"tools": [1], "zzz": 1}):
        with pytest.raises(ValidationError) as error:
            CompletionRequest.model_validate({**TEXT, "user": "a", "metadata": {}, **fields})
        assert [problem["loc"] for problem in error.value.errors()] == [("tools",)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    exports, _ = decoders(tmp_path_factory.mktemp("large"), "data")
    with TestClient(create_app(ServiceSettings(exports["data"]))) as client:
        yield client


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("large")
    model, _ = adapted("bert", folder, targets=["query"], num_labels=3, pad_token_id=0)
    export_onnx(model, folder / "base", adapters="data", verify=False, tokenizer=chat_tokenizer())
    with TestClient(create_app(ServiceSettings(folder / "base"))) as client:
        yield client


def refused(client: TestClient, path: str, body: dict[str, Any]) -> str:
    found = client.post(path, json=body)
    assert found.status_code == 400
    error = found.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


def test_what_there_is_no_room_for_is_not_read(
    text: TestClient, classes: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(text_requests, "prompt_ids", read)
    monkeypatch.setattr(TextReader, "texts", read)
    body = {"model": "data", "prompt": ["a"] * 100, "n": 100}
    assert refused(text, "/v1/completions", body).startswith(
        "10000 answers are asked for, n to each prompt, and there is"
    )
    assert "100 rows are given, and there is room for 72" in refused(classes, "/classify", {"input": ["a"] * 100})


def test_options_name_few_tokens(text: TestClient) -> None:
    body: dict[str, Any] = {"model": "data", "prompt": "a", "max_tokens": 1}
    for field, given in (("logit_bias", dict.fromkeys(map(str, range(1025)), 1)), ("stop_token_ids", [5] * 1025)):
        message = f"{field}: there are 1025 tokens, more than 1024; name fewer"
        assert refused(text, "/v1/completions", {**body, field: given}) == message
    few = {"logit_bias": dict.fromkeys(map(str, range(90)), 1), "stop_token_ids": [5] * 1024}
    text.post("/v1/completions", json={**body, **few}).raise_for_status()


def test_a_great_many_wrong_fields_of_tensors_are_counted(classes: TestClient) -> None:
    fields = dict.fromkeys(map(str, range(MANY)), 0)
    message = refused(classes, "/v2/models/base/infer", {"inputs": [], **fields})
    assert message == f"{MANY} fields of the request are wrong or not supported; correct them, or leave them out"
