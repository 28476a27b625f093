"""Requests as data: what model they name, and the messages of an app that answers them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from gralora_fx.service.scale.spread_adapters import AsgiRequest, answer, read

SCOPE = {"type": "http", "method": "POST", "path": "/a", "query_string": b"b=c", "headers": [(b"x", b"y")]}


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", b'{"model": "wide"}', "wide"),
        ("/v2/models/wide/infer", b'{"model": "other"}', "wide"),
        ("/v2/models/wide", b"", "wide"),
        ("/v1/completions", b'{"model": 1}', None),
        ("/v1/completions", b"[]", None),
        ("/v1/completions", b"{", None),
        ("/v1/completions", b"\xff", None),
        ("/v1/completions", b"[" * 100_000, None),
    ],
)
def test_the_model_of_a_request(path: str, body: bytes, model: str | None) -> None:
    assert AsgiRequest({"path": path}, body).model == model


def test_the_model_of_a_request_may_be_in_its_url() -> None:
    assert AsgiRequest({"path": "/embed", "query_string": b"a=b&model=wi%64e"}, b'{"inputs": "a"}').model == "wide"


def test_an_app_answers_as_it_does_itself() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        found = [request.method, request.url.path, request.url.query, request.headers["x"], await request.json()]
        await JSONResponse(found, 201)(scope, receive, send)

    async def talk() -> list[Any]:
        parts = [{"type": "http.request", "body": part, "more_body": part == b"[1"} for part in (b"[1", b", 2]")]

        async def receive() -> Any:
            return parts.pop(0)

        request = await read(Request({**SCOPE, "server": ("test", 80), "app": app}, receive))
        return [message async for message in answer(app, request)]

    start, body = asyncio.run(talk())
    assert start["status"] == 201
    assert json.loads(body["body"]) == ["POST", "/a", "b=c", "y", [1, 2]]


def test_an_answer_given_up_cancels_the_work() -> None:
    ended = []

    async def events() -> Any:
        try:
            while True:
                yield b"data"
                await asyncio.sleep(0.001)
        finally:
            ended.append(True)

    async def talk() -> None:
        messages = answer(StreamingResponse(events()), AsgiRequest(SCOPE, b""))
        assert (await anext(messages))["type"] == "http.response.start"
        assert (await anext(messages))["body"] == b"data"
        await messages.aclose()  # type: ignore[attr-defined]
        for _ in range(100):
            await asyncio.sleep(0.001)

    asyncio.run(talk())
    assert ended == [True]


def test_an_app_that_fails_before_it_answers() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("no answer")

    async def talk() -> list[Any]:
        return [message async for message in answer(app, AsgiRequest(SCOPE, b""))]

    with pytest.raises(ValueError, match="no answer"):
        asyncio.run(talk())
