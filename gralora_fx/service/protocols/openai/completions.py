"""`/v1/completions` and `/v1/chat/completions`: whole answers, server-sent events, and their choices."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.run.generate.detokenizer import TokenBytes
from gralora_fx.run.generate.token_choice import TokenScore
from gralora_fx.service.engines import TextEngine
from gralora_fx.service.protocols.openai.answer_plan import AnswerReader
from gralora_fx.service.protocols.openai.requests import ChatRequest, CompletionRequest
from gralora_fx.service.protocols.openai.strict_model import with_ignored
from gralora_fx.service.protocols.openai.text_requests import QuestionReader
from gralora_fx.service.replies import EventStream, TextAnswers
from gralora_fx.service.scheduling.text_jobs import Piece

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot represent


def completion_routes(engine: TextEngine, questions: QuestionReader) -> APIRouter:
    """Return the routes of completions and chats."""
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
    """Return the prompt text that each answer begins with (`echo`)."""
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
    """Yield the objects of a stream."""
    more = {"usage": None} if includes_usage else {}
    for choice in choices:
        if (first := choice.first()) is not None:
            yield {**head, "choices": [first], **more}
    async for index, piece in answers.pieces():
        if (part := choices[index].part(piece)) is not None:
            yield {**head, "choices": [part], **more}
    if includes_usage:
        yield {**head, "choices": [], "usage": answers.usage()}


class ChoiceWriter:
    """Writes one answer piece by piece; the streamed pieces add up to the whole answer."""

    def __init__(
        self,
        index: int,
        request: TextRequest,
        echo: str,
        texts: TokenBytes,
        *,
        is_chat: bool,
        reader: AnswerReader | None = None,
    ) -> None:
        """Begin an answer."""
        self._index, self._request, self._echo, self._is_chat = index, request, echo, is_chat
        self._reader = reader
        self._writer = None
        if request.options.sampling.logprobs is not None:
            self._writer = LogprobWriter(texts, is_chat=is_chat)

    def first(self) -> dict[str, Any] | None:
        """Return the first chunk of a streamed chat message; None for a text completion."""
        return self._fields({"delta": {"role": "assistant", "content": ""}}, None, None) if self._is_chat else None

    def part(self, piece: Piece) -> dict[str, Any] | None:
        """Return the chunk of a piece; None while the text may be part of an item's mark or name."""
        text, self._echo = self._echo + piece.text, ""
        if not self._is_chat:
            return self._fields({"text": text}, self._logprobs(piece), piece.ending)
        text, items = self._read(piece, streams=True)
        delta: dict[str, Any] = {"content": text} if text or (piece.scores and not items) else {}
        delta |= items
        if not delta and piece.ending is None:
            return None
        return self._fields({"delta": delta}, self._logprobs(piece), self._ending(piece))

    def whole(self, piece: Piece) -> dict[str, Any]:
        """Return a whole answer as one choice."""
        if not self._is_chat:
            return self._fields({"text": self._echo + piece.text}, self._logprobs(piece), piece.ending)
        text, items = self._read(piece, streams=False)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if items else "")}
        message |= {"refusal": None, "annotations": [], **items}
        return self._fields({"message": message}, self._logprobs(piece), self._ending(piece))

    def _read(self, piece: Piece, *, streams: bool) -> tuple[str, dict[str, Any]]:
        """Return a message's text, and the fields for other items in it."""
        if self._reader is None:
            return piece.text, {}
        parts = self._reader.step(piece.text)
        if piece.ending is not None:
            parts += self._reader.finish()
        items = [part for part in parts if part.item is not None]
        text = "".join(part.text for part in parts if part.item is None)
        return text, self._reader.in_chat(items, streams=streams) if items else {}

    def _ending(self, piece: Piece) -> str | None:
        has_items = self._reader is not None and self._reader.items and self._reader.is_whole
        return (
            self._reader.finish_reason
            if self._reader is not None and piece.ending == "stop" and has_items
            else piece.ending
        )

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Return a piece's logprobs; the first piece includes those of the prompt."""
        if self._writer is None:
            return None
        first = self._request.prompt[0] if self._request.options.scores_prompt else None
        if first is None or self._writer.is_begun:
            return self._writer.write(piece.scores)
        return self._writer.write((*piece.prompt_scores, *piece.scores), first)

    def _fields(self, content: dict[str, Any], logprobs: dict[str, Any] | None, ending: str | None) -> dict[str, Any]:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": ending}


class LogprobWriter:
    """Writes the logprobs of one answer piece by piece; `is_begun` once a piece was written."""

    def __init__(self, texts: TokenBytes, *, is_chat: bool) -> None:
        """Start at text offset 0."""
        self._texts, self._is_chat = texts, is_chat
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._letters = 0
        self.is_begun = False

    def write(self, scores: Sequence[TokenScore], first: int | None = None) -> dict[str, Any]:
        """Return the `logprobs` object of some tokens."""
        self.is_begun = True
        if self._is_chat:
            return {"content": [self._entry(score) for score in scores], "refusal": None}
        tokens = [*([] if first is None else [first]), *(score.token for score in scores)]
        missing: list[Any] = [None] * (len(tokens) - len(scores))
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [*missing, *(_finite(score.logprob) for score in scores)],
            "top_logprobs": [*missing, *(self._top(score) for score in scores)],
            "text_offset": [self._offset(token) for token in tokens],
        }

    def _entry(self, score: TokenScore) -> dict[str, Any]:
        top = [self._token(*pair) for pair in score.top]
        return {**self._token(score.token, score.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        utf8 = self._texts.bytes_of(token)
        return {"token": utf8.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(utf8)}

    def _top(self, score: TokenScore) -> dict[str, float]:
        """Return the likeliest tokens' logprobs by name, including the chosen token's."""
        pairs = [*score.top, *([] if score.token in dict(score.top) else [(score.token, score.logprob)])]
        return {self._name(token): _finite(logprob) for token, logprob in reversed(pairs)}

    def _name(self, token: int) -> str:
        """Return a token's text; bytes that are not valid UTF-8 are escaped."""
        utf8 = self._texts.bytes_of(token)
        try:
            return utf8.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8)

    def _offset(self, token: int) -> int:
        """Return a token's offset in the answer's text, and advance past it."""
        start = self._letters
        if not self._texts.is_special(token):
            self._letters += len(self._decoder.decode(self._texts.bytes_of(token)))
        return start


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
