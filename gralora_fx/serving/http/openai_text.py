"""`/v1/completions` and `/v1/chat/completions`: whole answers, and streams of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gralora_fx.serving.http.disconnects import unless_disconnected
from gralora_fx.serving.http.engines import TextEngine
from gralora_fx.serving.http.failures import error_body
from gralora_fx.serving.http.openai_requests import ChatRequest, CompletionRequest
from gralora_fx.serving.http.text_answers import TextAnswers, read_request
from gralora_fx.serving.scheduling.failures import RunError
from gralora_fx.serving.scheduling.text_jobs import Piece


@dataclass(frozen=True)
class _Form:
    """How answers are written.

    Attributes:
        model: The model's name, as the request gives it.
        is_chat: Whether they are messages.
        id: The answer's id.
        created: When it was begun, in seconds.
    """

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, is_chunk: bool, **more: Any) -> dict[str, Any]:
        """The object around some choices."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}"
        return {
            "id": name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def choice(self, index: int, text: str, ending: str | None) -> dict[str, Any]:
        """A whole answer."""
        content: dict[str, Any] = {"text": text}
        if self.is_chat:
            content = {"message": {"role": "assistant", "content": text}}
        return {"index": index, **content, "logprobs": None, "finish_reason": ending}

    def first(self) -> dict[str, Any]:
        """What a streamed message begins with."""
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a streamed answer."""
        content: dict[str, Any] = {"text": piece.text}
        if self.is_chat:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        return {"index": index, **content, "logprobs": None, "finish_reason": piece.ending}


def text_routes(engine: TextEngine) -> APIRouter:
    """The routes of a decoder."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(engine, asked, request, _Form(asked.model, is_chat=False))

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _answer(engine, asked, request, _Form(asked.model, is_chat=True))

    return router


async def _answer(
    engine: TextEngine, asked: CompletionRequest | ChatRequest, request: Request, form: _Form
) -> Response:
    with engine.names.held(asked.model) as adapter:
        answers = TextAnswers(engine, await read_request(engine, asked, adapter))
    if asked.stream:
        return _Stream(answers, _events(answers, form, includes_usage=asked.includes_usage))
    try:
        return await unless_disconnected(request, _whole(answers, form))
    finally:
        answers.cancel()


class _Stream(StreamingResponse):
    """Server-sent events; the answers are given up when the client goes away, even before the first event."""

    def __init__(self, answers: TextAnswers, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _whole(answers: TextAnswers, form: _Form) -> Response:
    texts = [""] * len(answers.usage.answers)
    endings: list[str | None] = [None] * len(texts)
    async for index, piece in answers.pieces():
        texts[index] += piece.text
        endings[index] = piece.ending
    choices = [form.choice(index, *pair) for index, pair in enumerate(zip(texts, endings, strict=True))]
    return JSONResponse(form.body(choices, is_chunk=False, usage=answers.usage.fields()))


async def _events(answers: TextAnswers, form: _Form, *, includes_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; one that failed midway ends with an error."""
    more = {"usage": None} if includes_usage else {}
    try:
        if form.is_chat:
            yield _event(form.body([form.first()], is_chunk=True, **more))
        async for index, piece in answers.pieces():
            yield _event(form.body([form.part(index, piece)], is_chunk=True, **more))
        if includes_usage:
            yield _event(form.body([], is_chunk=True, usage=answers.usage.fields()))
    except RunError as error:
        yield _event(error_body(500, str(error)))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    # ASCII, since some clients split lines at other letters too, such as U+2028
    return f"data: {json.dumps(body)}\n\n"
