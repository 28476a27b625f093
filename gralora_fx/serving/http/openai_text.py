"""`/v1/completions` and `/v1/chat/completions`: whole answers, and streams of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gralora_fx.serving.http.deadlines import DeadlineError, timeout_of
from gralora_fx.serving.http.disconnects import unless_disconnected
from gralora_fx.serving.http.engines import TextEngine
from gralora_fx.serving.http.event_stream import END, EventStream, event
from gralora_fx.serving.http.failures import error_body, status_of
from gralora_fx.serving.http.openai_forms import Choice, Form
from gralora_fx.serving.http.openai_requests import ChatRequest, CompletionRequest
from gralora_fx.serving.http.text_answers import TextAnswers, read_request
from gralora_fx.serving.scheduling.queue import RunError
from gralora_fx.serving.scheduling.text_jobs import Piece
from gralora_fx.serving.token_texts import TokenTexts


def text_routes(engine: TextEngine) -> APIRouter:
    """The routes of a decoder."""
    router, texts = APIRouter(), TokenTexts(engine.tokenizer)

    @router.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(engine, texts, asked, request)

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _answer(engine, texts, asked, request)

    return router


async def _answer(
    engine: TextEngine, texts: TokenTexts, asked: CompletionRequest | ChatRequest, request: Request
) -> Response:
    form = Form(asked.model, is_chat=isinstance(asked, ChatRequest))
    seconds = timeout_of(request)
    with engine.names.held(asked.model) as adapter:
        questions = await read_request(engine, asked, adapter)
        answers = TextAnswers(engine, questions, seconds)
    choices = [
        Choice(form, index, question, echo, texts)
        for index, (question, echo) in enumerate(zip(questions.requests, questions.echoes, strict=True))
    ]
    if asked.stream:
        return EventStream(answers, _events(answers, form, choices, includes_usage=asked.includes_usage))
    try:
        return await unless_disconnected(request, _whole(answers, form, choices))
    finally:
        answers.cancel()


async def _whole(answers: TextAnswers, form: Form, choices: Sequence[Choice]) -> Response:
    wholes = [Piece("", 0)] * len(choices)
    async for index, piece in answers.pieces():
        wholes[index] += piece
    written = [choice.whole(piece) for choice, piece in zip(choices, wholes, strict=True)]
    return JSONResponse(form.body(written, is_chunk=False, usage=answers.usage.fields()))


async def _events(
    answers: TextAnswers, form: Form, choices: Sequence[Choice], *, includes_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events; one that failed midway, or took too long, ends with an error."""
    more = {"usage": None} if includes_usage else {}
    try:
        for choice in choices if form.is_chat else ():
            yield event(form.body([choice.first()], is_chunk=True, **more))
        async for index, piece in answers.pieces():
            yield event(form.body([choices[index].part(piece)], is_chunk=True, **more))
        if includes_usage:
            yield event(form.body([], is_chunk=True, usage=answers.usage.fields()))
    except (RunError, DeadlineError) as error:
        answers.cancel()
        yield event(error_body(status_of(error), str(error)))
    yield END
