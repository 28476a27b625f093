"""Clients of OpenAI's protocol as they are, each in an environment of its own: whatever they send by default is taken.

The model greets, and fills whatever form it is given: answers streamed as whole, calls of tools whose results go back,
forms that are met, embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_environments import run_client
from greeting_model import GREETING, greeting_model
from javascript_project import installed_project, needs_node, run_script
from running_service import serving
from sentence_encoders import encoded, save_encoder
from served_exports import CACHED, END
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tool_tokenizers import family_tokenizer

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app

MODES = {"chat": "/v1/chat/completions", "responses": "/v1/responses"}
WEATHER = {"city", "is_warm"}


class Watched:
    """An app, and the answers that it gave: path, status and the fields that it ignored."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.answers: list[tuple[str, int, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                ignored = headers.get(b"x-ignored-fields", b"").decode()
                self.answers.append((scope["path"], message["status"], ignored))
            await send(message)

        await self.app(scope, receive, watched)


class Services:
    """A decoder and a sentence encoder that run, and what the encoder's embeddings are."""

    def __init__(self, text: tuple[str, Watched], embedding: tuple[str, Watched], encoder: Path) -> None:
        self.urls, self.watched = [text[0], embedding[0]], [text[1], embedding[1]]
        self.vectors = encoded(encoder, ["a", "a", "b c"]).tolist()

    def ask(self, client: str) -> Any:
        """Run a client's script; return its findings, once all that it sent was taken."""
        for watched in self.watched:
            watched.answers.clear()
        found = run_script(installed_project(), client, *self.urls) if "." in client else run_client(client, *self.urls)
        answers = [answer for watched in self.watched for answer in watched.answers]
        assert {status for _, status, _ in answers} == {200}, answers
        return found

    @property
    def ignored(self) -> set[str]:
        """The fields without effect that were sent since then."""
        return {field for _, _, fields in self.watched[0].answers for field in fields.split(", ") if field}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("clients")
    tokenizer = family_tokenizer("hermes")
    model = greeting_model(tokenizer, eos_token_id=END, bos_token_id=1, pad_token_id=0, max_position_embeddings=4096)
    export_onnx(trace(model, task=CACHED), folder / "base", verify=False, tokenizer=tokenizer)
    encoder = save_encoder("bert", folder, "mean")
    export_onnx(load_traced(str(encoder), None, None), folder / "onnx", tokenizer=str(encoder), verify=False)
    text, embedding = (Watched(create_app(ServiceSettings(folder / name))) for name in ("base", "onnx"))
    with serving(text) as (host, port), serving(embedding) as (_, other):
        urls = [f"http://{host}:{each}/v1" for each in (port, other)]
        yield Services((urls[0], text), (urls[1], embedding), encoder)


def check_vectors(found: list[list[float]], expected: list[list[float]]) -> None:
    assert np.abs(np.array(found) - np.array(expected[-len(found) :])).max() <= 1e-5


def test_langchain(services: Services) -> None:
    found = services.ask("langchain")
    for name in MODES:
        own = found[name]
        assert own["whole"] == own["streamed"] == GREETING
        assert own["tools"] == [["get_weather"], GREETING]
        assert own["streamed call"]
        assert own["forms"] == ["Weather", "Weather"]
    assert found["completion"]["whole"] == found["completion"]["streamed"] == GREETING
    check_vectors(found["embeddings"], services.vectors)


def test_openai_agents(services: Services) -> None:
    found = services.ask("agents")
    assert {path for path, _, _ in services.watched[0].answers} == {*MODES.values()}
    assert {"store", "metadata"} <= services.ignored
    for name in MODES:
        own = found[name]
        assert own["whole"] == own["streamed"] == own["kept"] == GREETING
        assert own["tools"] == ["tool_call_item", "tool_call_output_item", "message_output_item"]
        assert own["result"].startswith("sunny in")
        assert own["answer"] == GREETING
        assert own["form"].keys() == WEATHER


def test_llama_index(services: Services) -> None:
    found = services.ask("llama_index")
    assert found["chat"]["forms"] == ["Weather", "Weather"]
    assert found["completion"]["whole"] == found["completion"]["streamed"] == GREETING
    assert "truncation" in services.ignored
    for name in MODES:
        assert found[name]["whole"] == found[name]["streamed"] == GREETING
        assert found[name]["tools"].startswith("sunny in")
    check_vectors(found["embeddings"], services.vectors)


def test_litellm(services: Services) -> None:
    found = services.ask("litellm")
    for name in ("openai", "hosted_vllm"):
        own = found[name]
        assert own["whole"] == own["streamed"] == own["idle"] == GREETING
        assert own["tools"] == ["get_weather", GREETING]
        assert own["form"].keys() == WEATHER
        check_vectors(own["embeddings"], services.vectors[1:])
    assert found["responses"] == {"status": "completed", "streamed": "response.completed"}
    assert found["completion"]["whole"] == GREETING
    assert {"store", "service_tier"} <= services.ignored


def test_pydantic_ai(services: Services) -> None:
    found = services.ask("pydantic_ai")
    for name in MODES:
        own = found[name]
        assert own["whole"] == own["streamed"] == GREETING
        assert own["tools"] == ["Weather", "Weather"]
        assert [result[:8] for result in own["results"]] == ["sunny in", "sunny in"]
        assert own["form"].keys() == WEATHER
    check_vectors(found["embeddings"], services.vectors[1:])


def test_instructor(services: Services) -> None:
    found = services.ask("instructor")
    assert all(part.keys() == WEATHER for parts in found.values() for part in parts)
    assert len(found) == 4


@needs_node
def test_vercels_ai_sdk(services: Services) -> None:
    found = services.ask("ai_sdk.mjs")
    for name in ("compatible", "responses", "chat"):
        own = found[name]
        assert own["whole"] == own["streamed"] == own["answer"] == GREETING
        assert own["tools"][0].startswith("sunny in")
        assert all(form.keys() == WEATHER for form in own["forms"])
        check_vectors(own["embeddings"], services.vectors[1:])
        assert own["completion"] == GREETING
    assert found["reasoned"] == GREETING
    assert "reasoning.effort" in services.ignored


@needs_node
def test_what_a_client_expects_to_be_kept_is_refused_with_a_remedy(services: Services) -> None:
    refused = run_script(installed_project(), "ai_sdk.mjs", services.urls[0], "references")
    assert (refused["status"], json.loads(refused["body"])["error"]["param"]) == (400, "input.1.type")
    assert "send the item itself, with store false" in refused["body"]
