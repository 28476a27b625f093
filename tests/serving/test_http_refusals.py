"""Refusals of requests as clients happen to send them: the field, the kind that fits best, the header."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_exports import decoders
from starlette.testclient import TestClient
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app

CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = decoders(tmp_path_factory.mktemp("decoder"), "data")[0]["data"]
    with TestClient(create_app(ServiceSettings(path, api_key="Secret"))) as client:
        client.headers["Authorization"] = "Bearer Secret"
        yield client


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = tmp_path_factory.mktemp("ranker")
    tiny_model("bert", num_labels=1, pad_token_id=0).save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    traced = load_traced(str(folder / "bert"), None, "text-classification")
    export_onnx(traced, folder / "onnx", tokenizer=str(folder / "bert"), verify=False)
    with TestClient(create_app(ServiceSettings(folder / "onnx"))) as client:
        yield client


def refusal(client: TestClient, path: str, **request: Any) -> tuple[str | None, str]:
    """Return the field and the message of a request that is refused."""
    found = client.post(path, **request)
    assert found.status_code == 400
    error = found.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "the header Content-Type is missing; send the body as application/json"),
        (
            {"Content-Type": "application/x-www-form-urlencoded"},
            "the header Content-Type is 'application/x-www-form-urlencoded'; send the body as application/json",
        ),
    ],
)
def test_a_body_of_another_type_is_said_by_its_header(
    decoder: TestClient, headers: dict[str, str], message: str
) -> None:
    body = b'{"model": "small", "prompt": "a"}'
    assert refusal(decoder, "/v1/completions", content=body, headers=headers) == (None, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is missing; give a JSON object"),
        (b"[]", "the body is JSON, but not an object; give one"),
        (b"3", "the body is JSON, but not an object; give one"),
    ],
)
def test_a_body_that_is_no_object(decoder: TestClient, body: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert refusal(decoder, "/v1/completions", content=body, headers=headers) == (None, message)


def test_of_the_kinds_of_a_field_the_one_that_fits_is_named(decoder: TestClient, ranker: TestClient) -> None:
    request = {"model": "small", "prompt": "a", "stop": [str(index) for index in range(17)]}
    field, message = refusal(decoder, "/v1/completions", json=request)
    assert (field, message.split(" after")[0]) == ("stop", "stop: List should have at most 16 items")
    field, message = refusal(ranker, "/v1/rerank", json={"query": "a", "documents": ["b", {}]})
    assert (field, message) == ("documents.1.text", "documents.1.text is missing or null; give it")


def test_a_null_that_is_needed_is_said_to_be_missing(decoder: TestClient) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    found = refusal(decoder, "/v1/chat/completions", json={**CHAT, "messages": messages})
    assert found == ("messages.1.content", "messages.1.content is missing or null; give it")


def test_answers_are_counted_not_prompts(decoder: TestClient) -> None:
    _, message = refusal(decoder, "/v1/completions", json={"model": "small", "prompt": "a", "n": 100, "max_tokens": 1})
    assert message.startswith("100 answers are asked for, n to each prompt, and there is room for 80")


def test_fields_without_effect_are_taken(decoder: TestClient, ranker: TestClient) -> None:
    request = {**CHAT, "logprobs": False, "top_logprobs": 0, "verbosity": "medium", "reasoning_effort": "none"}
    assert (
        decoder.post("/v1/chat/completions", json=request).raise_for_status().json()["choices"][0]["logprobs"] is None
    )
    request = {"query": "a", "documents": ["b"], "user": "me", "return_documents": None, "top_n": None}
    ranker.post("/v1/rerank", json=request).raise_for_status()
    ranker.post("/classify", json={"input": "a", "user": "me"}).raise_for_status()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"n": 100}, "n"),
        ({"max_tokens": 99999}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ],
)
def test_what_is_wrong_beside_the_types_of_fields_is_named_too(
    decoder: TestClient, fields: dict[str, Any], field: str
) -> None:
    body = json.dumps({**CHAT, **fields})
    headers = {"Content-Type": "application/json"}
    assert refusal(decoder, "/v1/chat/completions", content=body, headers=headers)[0] == field


def test_a_key_has_its_own_letters_and_the_scheme_any(decoder: TestClient) -> None:
    for given, status in (
        ("bearer Secret", 200),
        ("BEARER Secret", 200),
        ("Bearer secret", 401),
        ("bearerSecret", 401),
    ):
        assert decoder.get("/v1/models", headers={"Authorization": given}).status_code == status
