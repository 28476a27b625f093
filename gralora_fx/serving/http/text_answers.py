"""Prompts handed to a scheduler, and their pieces as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import ServingError
from gralora_fx.loading.tokenizers import prompt_ids
from gralora_fx.serving.http.engines import TextEngine
from gralora_fx.serving.http.openai_requests import ChatRequest, CompletionRequest
from gralora_fx.serving.prompts import stop_strings
from gralora_fx.serving.scheduling.failures import RunError
from gralora_fx.serving.scheduling.text_jobs import Piece, Sink, TextRequest


@dataclass
class Usage:
    """Tokens of a request.

    Attributes:
        prompt: Those of its prompts.
        answers: Those of each answer so far.
    """

    prompt: int
    answers: list[int]

    def fields(self) -> dict[str, int]:
        """OpenAI's form."""
        new = sum(self.answers)
        return {"prompt_tokens": self.prompt, "completion_tokens": new, "total_tokens": self.prompt + new}


class TextAnswers:
    """The answers to the prompts of one request."""

    def __init__(self, engine: TextEngine, requests: Sequence[TextRequest]) -> None:
        """Queue the prompts, all or none; from the event loop's thread.

        Args:
            engine: The decoder.
            requests: What to answer.

        Raises:
            ServingError: One cannot be run, or there is no room.
        """
        self.usage = Usage(sum(len(request.prompt) for request in requests), [0] * len(requests))
        self._left = len(requests)
        self._events: asyncio.Queue[tuple[int, Piece | RunError]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(index: int) -> Sink:
            return lambda event: _put(loop, self._events, (index, event))

        self._jobs = engine.queue.submit([(request, sink(index)) for index, request in enumerate(requests)])

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come, each with the number of its prompt.

        Raises:
            RunError: Running failed.
        """
        while self._left:
            index, event = await self._events.get()
            if isinstance(event, RunError):
                raise event
            self.usage.answers[index] = event.tokens
            self._left -= event.ending is not None
            yield index, event

    def cancel(self) -> None:
        """Give up what has not ended."""
        for job in self._jobs:
            job.cancel()


async def read_request(
    engine: TextEngine, asked: CompletionRequest | ChatRequest, adapter: str | None
) -> list[TextRequest]:
    """What a request asks for, its prompts as token ids.

    Args:
        engine: The decoder.
        asked: The request.
        adapter: The key of the adapter that its model's name means; None for the base.

    Raises:
        ServingError: The prompts or options cannot be taken.
    """
    if asked.stream_options is not None and not asked.stream:
        raise ServingError("stream_options has no effect without stream; give stream too, or leave it out")
    stop = stop_strings(() if asked.stop is None else asked.stop, engine.tokenizer)
    sampling = asked.sampling
    rows: list[list[int]] = await run_in_threadpool(_read_prompts, engine, asked.prompts)
    return [
        TextRequest(tuple(ids), asked.most_tokens(engine.queue.limits.context - len(ids)), sampling, stop, adapter)
        for ids in rows
    ]


def _read_prompts(engine: TextEngine, prompts: Sequence[Any]) -> list[list[int]]:
    return [prompt_ids(prompt, engine.tokenizer, ServingError) for prompt in prompts]


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: Any) -> None:
    """Hand an event over from a scheduler's thread; to nobody, if the loop was closed while it came."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
