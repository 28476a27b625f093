"""Prompts that are surely too long are refused before they are tokenized, on every way that prompts come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sentence_encoders import save_encoder
from served_exports import chat_tokenizer, decoders
from starlette.testclient import TestClient
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.limits import TooLargeError
from gralora_fx.service.app import create_app
from gralora_fx.serving import load

LONG = "A long text, without end. " * 40_000  # a megabyte
CHAT = [{"role": "user", "content": LONG}]
TOOL = {"type": "function", "function": {"name": "a", "description": LONG}}
TOO_LONG = {  # on each way: the client, the path, the request, its field, and what is said
    "completions": ("decoder", "/v1/completions", {"prompt": LONG}, "prompt"),
    "of several": ("decoder", "/v1/completions", {"prompt": ["a", LONG]}, "prompt"),
    "chats": ("decoder", "/v1/chat/completions", {"messages": CHAT}, "messages"),
    "responses": ("decoder", "/v1/responses", {"input": LONG}, "input"),
    "instructions": ("decoder", "/v1/responses", {"input": "a", "instructions": LONG}, "input"),
    "tools": (
        "decoder",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]},
        "messages",
    ),
    "embeddings": ("encoder", "/v1/embeddings", {"input": ["a", LONG]}, None),
    "classes": ("ranker", "/classify", {"input": LONG}, None),
    "documents": ("ranker", "/v1/rerank", {"query": "a", "documents": ["b", LONG]}, None),
    "a query": ("ranker", "/v1/rerank", {"query": LONG, "documents": ["b"]}, None),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders(tmp_path_factory.mktemp("long"), "data")[0]["data"]


@pytest.fixture(scope="module")
def decoder(exported: Path) -> Iterator[TestClient]:
    with TestClient(create_app(ServiceSettings(exported, max_batch=2))) as client:
        yield client


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("sentences")
    source = str(save_encoder("bert", folder, "mean"))
    export_onnx(load_traced(source, None, None), folder / "data", tokenizer=source, verify=False)
    with TestClient(create_app(ServiceSettings(folder / "data"))) as client:
        yield client


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = tmp_path_factory.mktemp("ranker") / "data"
    model = trace(tiny_model("bert", num_labels=1, pad_token_id=0), task="text-classification")
    export_onnx(model, path, tokenizer=chat_tokenizer(), verify=False)
    with TestClient(create_app(ServiceSettings(path))) as client:
        yield client


@pytest.mark.parametrize("name", TOO_LONG)
def test_no_request_has_it_tokenized(request: pytest.FixtureRequest, read: list[int], name: str) -> None:
    kind, path, body, field = TOO_LONG[name]
    response = request.getfixturevalue(kind).post(path, json={"model": "data", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert "characters, which are" in error["message"]
    assert error["message"].endswith("; shorten it")
    assert max(read, default=0) < 100


def test_of_several_prompts_none_is_tokenized_after_one_that_is_too_long(decoder: TestClient, read: list[int]) -> None:
    response = decoder.post("/v1/completions", json={"model": "data", "prompt": ["a" * 65, "b" * 60]})
    assert (
        response.json()["error"]["message"] == "the prompt has 65 tokens, beyond the context of 64 tokens; shorten it"
    )
    assert read == [65]
    assert 'reason="too_large"' in decoder.get("/metrics").text


def test_python_refuses_it_likewise(exported: Path, read: list[int]) -> None:
    model = load(exported)
    for prompts in (LONG, ["a", LONG], CHAT):
        with pytest.raises(TooLargeError, match="characters, which are beyond the context of 64 tokens; shorten it"):
            model.generate(prompts, max_new_tokens=1)
    assert max(read) < 100
    with pytest.raises(ServingError, match="prompt 0 has 64 tokens, more than the context of 64"):
        model.generate("a" * 64)
