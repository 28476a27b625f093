"""`/v1/completions` and `/v1/chat/completions`: whole answers, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import codecs
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import ServingError
from gralora_fx.loading.tokenizers import prompt_ids
from gralora_fx.serving.completion import TextRequest, seeded
from gralora_fx.serving.detokenizer import TokenBytes
from gralora_fx.serving.http.engines import TextEngine
from gralora_fx.serving.http.openai.requests import ChatRequest, CompletionRequest
from gralora_fx.serving.http.replies import EventStream, TextAnswers, timeout_of
from gralora_fx.serving.http.spans import note_model
from gralora_fx.serving.prompts import stop_strings
from gralora_fx.serving.scheduling.text_jobs import Piece
from gralora_fx.serving.token_choice import TokenScore

_COMPILING = 2  # forms of answers that are compiled at once, so that other requests find threads and cores
_LEAST = -9999.0  # a log-probability in the place of minus infinity, which JSON does not have


def text_routes(engine: TextEngine) -> APIRouter:
    """The routes of a decoder."""
    router, texts = APIRouter(), TokenBytes(engine.tokenizer)
    compiling = ThreadPoolExecutor(_COMPILING, "gralora-fx forms")

    @router.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(engine, texts, compiling, asked, request)

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _answer(engine, texts, compiling, asked, request)

    return router


async def _answer(
    engine: TextEngine,
    texts: TokenBytes,
    compiling: ThreadPoolExecutor,
    asked: CompletionRequest | ChatRequest,
    request: Request,
) -> Response:
    is_chat, seconds, begun = isinstance(asked, ChatRequest), timeout_of(request), time.monotonic()
    async with engine.models.ready(asked.model, seconds) as adapter:
        note_model(request.scope, asked.model, adapter)
        requests, prompt_tokens = await _text_requests(engine, compiling, asked, adapter)
        echoes = await run_in_threadpool(_echoes, engine, asked) if asked.echo else [""] * len(requests)
        answers = TextAnswers(engine.queue, requests, prompt_tokens, seconds, begun, each=asked.n)
    choices = [
        ChoiceWriter(index, question, echo, texts, is_chat=is_chat)
        for index, (question, echo) in enumerate(zip(requests, echoes, strict=True))
    ]
    kind = "text_completion"
    if is_chat:
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    head = {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}
    if asked.stream:
        return EventStream(answers, _chunks(answers, head, choices, includes_usage=asked.includes_usage))
    return await answers.respond(request, partial(_whole, answers, head, choices))


async def _text_requests(
    engine: TextEngine, compiling: ThreadPoolExecutor, asked: CompletionRequest | ChatRequest, adapter: str | None
) -> tuple[list[TextRequest], int]:
    """What a request asks for.

    Args:
        engine: The decoder.
        compiling: Compiles forms of answers.
        asked: The request.
        adapter: The key of the adapter that its model's name means; None for the base.

    Returns:
        What to answer, of each prompt as many as it has answers; and the tokens of the prompts, each counted once.

    Raises:
        ServingError: The prompts or options cannot be taken.
    """
    queue = engine.queue
    if asked.stream_options is not None and not asked.stream:
        raise ServingError("stream_options has no effect without stream; give stream too, or leave it out")
    queue.check_count(len(asked.prompts) * asked.n)
    if engine.inputs is not None:
        engine.inputs.check_texts(asked.prompts)
        if asked.echo:
            raise ServingError("echo has no effect: an encoder-decoder does not go on from its prompt; leave it out")
    scores_prompt = asked.echo and asked.top_scores is not None
    if scores_prompt and not queue.scores_prompts:
        raise ServingError(
            "echo with logprobs needs the logits of every position, and the export gives those of the last; export the "
            "model with logits='all', or leave one of them out"
        )
    stop = stop_strings(() if asked.stop is None else asked.stop, engine.tokenizer)
    sampling = asked.sampling(queue.limits.ends)
    grammar, forms = None, asked.forms()
    if any(value is not None for _, value in forms.values()):
        grammar = await asyncio.get_running_loop().run_in_executor(compiling, engine.grammars.of, forms)
    rows: list[list[int]] = await run_in_threadpool(_prompt_rows, engine, asked)
    requests: list[TextRequest] = []
    for ids in rows:
        source = None if engine.inputs is None else engine.inputs.of_ids(ids)
        prompt = tuple(ids) if source is None else (source.rules.start,)
        most = asked.most_tokens(queue.limits.context - len(prompt))
        if sampling.min_new_tokens > most:
            raise ServingError(f"min_tokens={sampling.min_new_tokens} is above the {most} tokens that are asked for")
        for _ in range(asked.n):
            own = seeded(sampling, len(requests))
            fields = prompt, most, own, stop, adapter, scores_prompt, source, grammar, asked.cache_salt
            requests.append(TextRequest(*fields))
    return requests, sum(map(len, rows))


def _prompt_rows(engine: TextEngine, asked: CompletionRequest | ChatRequest) -> list[list[int]]:
    return [prompt_ids(prompt, engine.tokenizer, ServingError) for prompt in asked.prompts]


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
        yield {**head, "choices": [choices[index].part(piece)], **more}
    if includes_usage:
        yield {**head, "choices": [], "usage": answers.usage()}


class ChoiceWriter:
    """One answer, written piece by piece; the pieces of a stream together are the whole answer."""

    def __init__(self, index: int, request: TextRequest, echo: str, texts: TokenBytes, *, is_chat: bool) -> None:
        """Begin an answer.

        Args:
            index: Its number.
            request: What it answers.
            echo: The text that it begins with.
            texts: Tokens as text.
            is_chat: Whether it is a message.
        """
        self._index, self._request, self._echo, self._is_chat = index, request, echo, is_chat
        self._writer = None
        if request.sampling.logprobs is not None:
            self._writer = LogprobWriter(texts, is_chat=is_chat)

    def first(self) -> dict[str, Any] | None:
        """What a streamed message begins with; None for a text."""
        return self._fields({"delta": {"role": "assistant", "content": ""}}, None, None) if self._is_chat else None

    def part(self, piece: Piece) -> dict[str, Any]:
        """A piece of a streamed answer."""
        text, self._echo = self._echo + piece.text, ""
        logprobs = self._logprobs(piece)
        content: dict[str, Any] = {"text": text}
        if self._is_chat:
            content = {"delta": {"content": text} if text or piece.scores else {}}
        return self._fields(content, logprobs, piece.ending)

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A whole answer, as a single piece."""
        content: dict[str, Any] = {"text": self._echo + piece.text}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": piece.text, "refusal": None, "annotations": []}}
        return self._fields(content, self._logprobs(piece), piece.ending)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """The scores of a piece; those of the prompt come with the first."""
        if self._writer is None:
            return None
        first = self._request.prompt[0] if self._request.scores_prompt else None
        if first is None or self._writer.is_begun:
            return self._writer.write(piece.scores)
        return self._writer.write((*piece.prompt_scores, *piece.scores), first)

    def _fields(self, content: dict[str, Any], logprobs: dict[str, Any] | None, ending: str | None) -> dict[str, Any]:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": ending}


class LogprobWriter:
    """Writes the scores of one answer, piece by piece.

    Attributes:
        is_begun: Whether a piece was written.
    """

    def __init__(self, texts: TokenBytes, *, is_chat: bool) -> None:
        """Begin at the first letter.

        Args:
            texts: Tokens as text.
            is_chat: Whether the answer is a message.
        """
        self._texts, self._is_chat = texts, is_chat
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._letters = 0
        self.is_begun = False

    def write(self, scores: Sequence[TokenScore], first: int | None = None) -> dict[str, Any]:
        """The `logprobs` of some tokens.

        Args:
            scores: Their scores.
            first: A token before them that has no score, of a text that begins with it.
        """
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
        """The likeliest tokens by name, and the one that was chosen if it is not among them."""
        pairs = [*score.top, *([] if score.token in dict(score.top) else [(score.token, score.logprob)])]
        return {self._name(token): _finite(logprob) for token, logprob in reversed(pairs)}

    def _name(self, token: int) -> str:
        """A token as text; a part of a letter as its bytes."""
        utf8 = self._texts.bytes_of(token)
        try:
            return utf8.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8)

    def _offset(self, token: int) -> int:
        """Where a token's text begins in the answer's."""
        start = self._letters
        if not self._texts.is_special(token):
            self._letters += len(self._decoder.decode(self._texts.bytes_of(token)))
        return start


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
