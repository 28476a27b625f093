"""`/v1/completions` and `/v1/chat/completions`: whole answers, and streams of server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from gralora_fx.run.generate.detokenizer import TokenBytes
from gralora_fx.service.engines import TextEngine
from gralora_fx.service.protocols.openai.choices import ChoiceWriter
from gralora_fx.service.protocols.openai.requests import ChatRequest, CompletionRequest
from gralora_fx.service.protocols.openai.strict_model import with_ignored
from gralora_fx.service.protocols.openai.text_requests import QuestionReader
from gralora_fx.service.replies import EventStream, TextAnswers
from gralora_fx.service.scheduling.text_jobs import Piece


def completion_routes(engine: TextEngine, questions: QuestionReader) -> APIRouter:
    """The routes of texts and chats."""
    router, texts = APIRouter(), TokenBytes(engine.tokenizer)

    @router.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(engine, texts, questions, asked, request)

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _answer(engine, texts, questions, asked, request)

    return router


async def _answer(
    engine: TextEngine,
    texts: TokenBytes,
    questions: QuestionReader,
    asked: CompletionRequest | ChatRequest,
    request: Request,
) -> Response:
    is_chat = isinstance(asked, ChatRequest)
    asks, answers = await questions.ask(asked, request)
    echoes = await run_in_threadpool(_echoes, engine, asked) if asked.echo else [""] * len(asks.requests)
    choices = [
        ChoiceWriter(index, question, echo, texts, is_chat=is_chat, reader=asks.reader())
        for index, (question, echo) in enumerate(zip(asks.requests, echoes, strict=True))
    ]
    kind = "text_completion"
    if is_chat:
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    head = {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}
    if asked.stream:
        chunks = _chunks(answers, head, choices, includes_usage=asked.includes_usage)
        return with_ignored(EventStream(answers, chunks), asked)
    return with_ignored(await answers.respond(request, partial(_whole, answers, head, choices)), asked)


def _echoes(engine: TextEngine, asked: CompletionRequest | ChatRequest) -> list[str]:
    """The text that each answer begins with: that of its prompt."""
    decode = engine.tokenizer.decode
    texts = [prompt if isinstance(prompt, str) else str(decode(prompt)) for prompt in asked.prompts]
    return [text for text in texts for _ in range(asked.n)]


async def _whole(answers: TextAnswers, head: dict[str, Any], choices: Sequence[ChoiceWriter]) -> Response:
    wholes = [Piece("", 0)] * len(choices)
    async for index, piece in answers.pieces():
        wholes[index] += piece
    written = [choice.whole(piece) for choice, piece in zip(choices, wholes, strict=True)]
    return JSONResponse({**head, "choices": written, "usage": answers.usage()})


async def _chunks(
    answers: TextAnswers, head: dict[str, Any], choices: Sequence[ChoiceWriter], *, includes_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream."""
    more = {"usage": None} if includes_usage else {}
    for choice in choices:
        if (first := choice.first()) is not None:
            yield {**head, "choices": [first], **more}
    async for index, piece in answers.pieces():
        if (part := choices[index].part(piece)) is not None:
            yield {**head, "choices": [part], **more}
    if includes_usage:
        yield {**head, "choices": [], "usage": answers.usage()}
