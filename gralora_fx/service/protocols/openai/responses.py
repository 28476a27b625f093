"""`/v1/responses`: whole responses, and streams of events in OpenAI's order."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gralora_fx.run.generate.detokenizer import TokenBytes
from gralora_fx.run.generate.request_errors import DeadlineError, RunError
from gralora_fx.service.engines import TextEngine
from gralora_fx.service.error_responses import status_of
from gralora_fx.service.protocols.openai.answer_plan import AnswerPart, AnswerReader, new_id
from gralora_fx.service.protocols.openai.completions import LogprobWriter
from gralora_fx.service.protocols.openai.response_requests import ResponseRequest
from gralora_fx.service.protocols.openai.strict_model import with_ignored
from gralora_fx.service.protocols.openai.text_requests import QuestionReader
from gralora_fx.service.replies import EventStream, TextAnswers
from gralora_fx.service.scheduling.text_jobs import Piece

_FIXED: Mapping[str, Any] = {  # constant fields, unless a feature has one
    "object": "response",
    "previous_response_id": None,
    "background": False,
    "max_tool_calls": None,
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": False,
    "truncation": "disabled",
    "user": None,
}


class ResponseWriter:
    """Writes one response; its events add up to the whole response."""

    def __init__(self, asked: ResponseRequest, reader: AnswerReader | None, scores: LogprobWriter | None) -> None:
        """Start a response."""
        self._reader, self._scores = reader, scores
        self._body = {"id": new_id("resp"), "created_at": int(time.time()), "model": asked.model, **_FIXED}
        self._body |= dict(asked.echoed())
        self._body |= {"status": "in_progress", "completed_at": None, "error": None, "incomplete_details": None}
        self._body |= {"output": [], "usage": None}
        self._items: list[dict[str, Any]] = []
        self._is_open = False  # whether the last item is open
        self._unsaid: list[dict[str, Any]] = []  # scores of tokens whose text is held back
        self._number = 0

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the opening events."""
        for name in ("created", "in_progress"):
            yield self._event(name, response=dict(self._body))

    def part(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece; the last piece closes the open item."""
        if self._scores is not None:
            self._unsaid += self._scores.write(piece.scores)["content"]
        for part in self._parts(piece):
            yield from self._text(part.text) if part.item is None else self._item(part)
        if piece.ending is None:
            return
        if not self._items:
            yield from self._open_message()
        is_cut = piece.ending == "length"
        is_whole = not is_cut
        if self._reader is not None and self._reader.items:
            is_whole = self._reader.is_whole  # whether the last, open item is complete
        yield from self._close("completed" if is_whole else "incomplete")
        self._body["status"] = "incomplete" if is_cut else "completed"
        if is_cut:
            self._body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._body["completed_at"] = int(time.time())

    def end(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the final event."""
        return self._event(self._body["status"], response=self.whole(usage))

    def failed(self, status: int, message: str) -> dict[str, Any]:
        """Return the final event of a failed run."""
        error = {"code": "invalid_prompt" if status < 500 else "server_error", "message": message}
        output = [{**item, "status": item["status"].replace("in_progress", "incomplete")} for item in self._items]
        return self._event("failed", response={**self._body, "status": "failed", "error": error, "output": output})

    def whole(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole response."""
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        tokens = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return {**self._body, "output": self._items, "usage": tokens}

    def _parts(self, piece: Piece) -> list[AnswerPart]:
        if self._reader is None:
            return [AnswerPart(piece.text)] if piece.text else []
        return self._reader.step(piece.text) + (self._reader.finish() if piece.ending else [])

    def _text(self, text: str) -> Iterator[dict[str, Any]]:
        if not self._is_open:
            yield from self._open_message()
        content = self._items[-1]["content"][0]
        scores, self._unsaid = self._unsaid, []
        content["text"] += text
        content["logprobs"] += scores
        yield self._event("output_text.delta", **self._place(), delta=text, logprobs=scores)

    def _item(self, part: AnswerPart) -> Iterator[dict[str, Any]]:
        assert self._reader is not None
        if (item := self._reader.begun(part)) is not None:
            yield from self._close("completed")
            yield from self._open({**item, "status": "in_progress"})
        self._unsaid = []  # scores of tokens that are not text
        if part.text:
            self._items[-1][self._reader.text_field] += part.text
            yield self._event(f"{self._reader.event}.delta", **self._place(), delta=part.text)

    def _open_message(self) -> Iterator[dict[str, Any]]:
        item = {"id": new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        yield from self._open(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items[-1]["content"] = [part]
        yield self._event("content_part.added", **self._place(), part={**part, "logprobs": []})

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._items.append(item)
        self._is_open = True
        yield self._event("output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """Yield the closing events of the open item, if any."""
        if not self._is_open:
            return
        item, self._is_open = self._items[-1], False
        if item["type"] == "message":
            (content,) = item["content"]
            if self._reader is None or not self._reader.items:
                content["logprobs"] += self._unsaid
            said = {"text": content["text"], "logprobs": content["logprobs"]}
            yield self._event("output_text.done", **self._place(), **said)
            yield self._event("content_part.done", **self._place(), part=content)
        elif self._reader is not None:
            field = self._reader.text_field
            yield self._event(f"{self._reader.event}.done", **self._place(), **{field: item[field]})
        item["status"] = status
        yield self._event("output_item.done", output_index=len(self._items) - 1, item=item)

    def _place(self) -> dict[str, Any]:
        item = self._items[-1]
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        return place | ({"content_index": 0} if item["type"] == "message" else {})

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": f"response.{name}", "sequence_number": number, **fields}


def response_routes(engine: TextEngine, questions: QuestionReader) -> APIRouter:
    """Return the route of responses."""
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
    """Yield the events of a stream; one that fails or times out midway ends with a `failed` event."""
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
