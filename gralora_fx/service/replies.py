"""Responses to clients that may disconnect or time out: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import nullcontext
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gralora_fx.errors import ServingError, shown
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.run.generate.request_errors import DeadlineError, RunError
from gralora_fx.service.error_responses import error_body, status_of
from gralora_fx.service.scheduling.continuous import ContinuousScheduler
from gralora_fx.service.scheduling.text_jobs import Piece, Sink, TextJob
from gralora_fx.service.spans import note_answers

_HEADER = "X-Request-Timeout"
END = b"data: [DONE]\n\n"
_CLIENT_CLOSED = 499  # nginx's status; nobody reads it


def timeout_of(request: Request) -> float | None:
    """Return a request's time limit in seconds: its header's, or the service's if that is less."""
    limit: float | None = request.app.state.timeout
    header = request.headers.get(_HEADER)
    if header is None:
        return limit
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ServingError(f"{_HEADER} must be a number of seconds above 0, but got {shown(header)}")
    return seconds if limit is None else min(seconds, limit)


async def unless_disconnected(
    request: Request, work: Callable[[], Coroutine[Any, Any, Response]], begun: float | None = None
) -> Response:
    """Await a response; cancel its work if the client disconnects or the time limit passes."""
    seconds = timeout_of(request)
    working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(_disconnected(request))
    try:
        left = _left(seconds, begun)
        await asyncio.wait((working, leaving), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if not leaving.done():
            raise _too_late(seconds)
        return Response(status_code=_CLIENT_CLOSED)
    finally:
        working.cancel()
        leaving.cancel()


def _left(seconds: float | None, begun: float | None) -> float | None:
    """Return the seconds left of a time limit that started at `begun`."""
    return seconds if seconds is None or begun is None else max(seconds - (time.monotonic() - begun), 0.0)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_late(seconds: float | None) -> DeadlineError:
    return DeadlineError(
        f"the request was not answered within {seconds:g} s, and was cancelled; give it more time with {_HEADER}, or "
        "ask for fewer tokens"
    )


class TextAnswers:
    """The answers to the prompts of one request; `jobs` are those in progress."""

    def __init__(
        self,
        queue: ContinuousScheduler,
        requests: Sequence[TextRequest],
        prompt_tokens: int,
        seconds: float | None = None,
        begun: float | None = None,
        *,
        each: int = 1,
    ) -> None:
        """Queue the prompts, all or none; call from the event loop's thread.

        Args:
            queue: Runs them.
            requests: One for each answer.
            prompt_tokens: Tokens of the prompts, each counted once.
            seconds: Time limit; None for no limit.
            begun: When the time limit started (`time.monotonic`); None for now.
            each: Number of answers for each prompt; they are adjacent in `requests`.
        """
        self._prompt_tokens, self._tokens, self._each = prompt_tokens, [0] * len(requests), each
        self._cached = [0] * len(requests)
        self._left = len(requests)
        self._events: asyncio.Queue[tuple[int, Piece | RunError]] = asyncio.Queue()
        loop, left = asyncio.get_running_loop(), _left(seconds, begun)
        self._seconds, self._end = seconds, None if left is None else loop.time() + left

        def sink(index: int) -> Sink:
            return lambda event: _put(loop, self._events, (index, event))

        self.jobs: list[TextJob] = queue.submit([(request, sink(index)) for index, request in enumerate(requests)])

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all answers as they come, each with its answer's index."""
        while self._left:
            try:
                async with nullcontext() if self._end is None else asyncio.timeout_at(self._end):
                    index, event = await self._events.get()
            except TimeoutError as error:
                raise _too_late(self._seconds) from error
            if isinstance(event, RunError):
                raise event
            self._tokens[index], self._cached[index] = event.tokens, event.cached
            self._left -= event.ending is not None
            yield index, event

    def cancel(self) -> None:
        """Cancel the answers in progress."""
        for job in self.jobs:
            job.cancel()

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens taken from the prefix cache; of several answers to a prompt, the least."""
        return sum(min(self._cached[at : at + self._each]) for at in range(0, len(self._cached), self._each))

    def usage(self) -> dict[str, Any]:
        """Return the tokens so far as OpenAI's `usage`."""
        prompt, new = self._prompt_tokens, sum(self._tokens)
        details = {"prompt_tokens_details": {"cached_tokens": self.cached_tokens}}
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, **details}

    async def respond(self, request: Request, whole: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
        """Return the response with whole answers; cancel them if the client disconnects or the time limit passes."""
        note_answers(request.scope, self)
        try:
            return await unless_disconnected(request, whole)
        finally:
            self.cancel()


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: Any) -> None:
    """Post an event from a scheduler's thread; drop it if the loop was closed meanwhile."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


class EventStream(StreamingResponse):
    """Server-sent events; the answers are cancelled when the client disconnects, even before the first event."""

    def __init__(self, answers: TextAnswers, objects: AsyncIterator[dict[str, Any]], *, is_typed: bool = False) -> None:
        """Start a stream."""
        events = self._typed(objects) if is_typed else self._events(objects)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        note_answers(scope, self._answers)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()

    async def _events(self, objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        """Yield the events; a stream that fails or times out midway ends with an error event."""
        try:
            async for body in objects:
                yield event(body)
        except (RunError, DeadlineError) as error:
            self._answers.cancel()
            yield event(error_body(status_of(error), str(error), error.field))
        yield END

    async def _typed(self, objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        async for body in objects:
            yield f"event: {body['type']}\n".encode() + event(body)


def event(body: dict[str, Any]) -> bytes:
    """Encode an object as a server-sent event; in ASCII, since some clients also split lines at U+2028."""
    text = orjson.dumps(body)
    return b"data: " + (text if text.isascii() else json.dumps(body).encode()) + b"\n\n"
