"""`/v1/responses`: whole responses, and streams of their events; nothing of them is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gralora_fx.run.generate.detokenizer import TokenBytes
from gralora_fx.run.generate.request_errors import DeadlineError, RunError
from gralora_fx.service.engines import TextEngine
from gralora_fx.service.error_responses import status_of
from gralora_fx.service.protocols.openai.completions import LogprobWriter
from gralora_fx.service.protocols.openai.response_requests import ResponseRequest
from gralora_fx.service.protocols.openai.response_writer import ResponseWriter
from gralora_fx.service.protocols.openai.strict_model import with_ignored
from gralora_fx.service.protocols.openai.text_requests import QuestionReader
from gralora_fx.service.replies import EventStream, TextAnswers


def response_routes(engine: TextEngine, questions: QuestionReader) -> APIRouter:
    """The route of responses."""
    router, texts = APIRouter(), TokenBytes(engine.tokenizer)

    @router.post("/v1/responses")
    async def respond(asked: ResponseRequest, request: Request) -> Response:
        asks, answers = await questions.ask(asked, request)
        scores = None if asked.top_scores is None else LogprobWriter(texts, is_chat=True)
        writer = ResponseWriter(asked, asks.reader(), scores)
        if asked.stream:
            return with_ignored(EventStream(answers, _events(answers, writer), is_typed=True), asked)

        async def whole() -> Response:
            async for _, piece in answers.pieces():
                for _ in writer.part(piece):
                    pass
            return JSONResponse(writer.whole(answers.usage()))

        return with_ignored(await answers.respond(request, whole), asked)

    return router


async def _events(answers: TextAnswers, writer: ResponseWriter) -> AsyncIterator[dict[str, object]]:
    """The events of a stream; one that fails midway, or takes too long, ends with that."""
    for event in writer.begin():
        yield event
    try:
        async for _, piece in answers.pieces():
            for event in writer.part(piece):
                yield event
    except (RunError, DeadlineError) as error:
        answers.cancel()
        yield writer.failed(status_of(error), str(error))
    else:
        yield writer.end(answers.usage())
