"""Prompts handed to a scheduler, and their pieces as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import ServingError
from gralora_fx.loading.tokenizers import prompt_ids
from gralora_fx.serving.answers import seeded
from gralora_fx.serving.http.deadlines import too_late
from gralora_fx.serving.http.engines import TextEngine
from gralora_fx.serving.http.openai_requests import ChatRequest, CompletionRequest
from gralora_fx.serving.prompts import stop_strings
from gralora_fx.serving.scheduling.queue import RunError
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


@dataclass(frozen=True)
class Questions:
    """What a request asks for.

    Attributes:
        requests: What to answer; of each prompt as many as it has answers.
        echoes: Of each the text of its prompt, if the answer begins with it; else none.
        prompt_tokens: Tokens of the prompts, each counted once.
    """

    requests: list[TextRequest]
    echoes: list[str]
    prompt_tokens: int


class TextAnswers:
    """The answers to the prompts of one request."""

    def __init__(self, engine: TextEngine, questions: Questions, seconds: float | None = None) -> None:
        """Queue the prompts, all or none; from the event loop's thread.

        Args:
            engine: The decoder.
            questions: What to answer.
            seconds: How long it may take; None for no limit.

        Raises:
            ServingError: One cannot be run, or there is no room.
        """
        requests = questions.requests
        self.questions = questions
        self.usage = Usage(questions.prompt_tokens, [0] * len(requests))
        self._left = len(requests)
        self._events: asyncio.Queue[tuple[int, Piece | RunError]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._seconds, self._end = seconds, None if seconds is None else loop.time() + seconds

        def sink(index: int) -> Sink:
            return lambda event: _put(loop, self._events, (index, event))

        self._jobs = engine.queue.submit([(request, sink(index)) for index, request in enumerate(requests)])

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come, each with the number of its answer.

        Raises:
            RunError: Running failed.
            DeadlineError: It took too long.
        """
        while self._left:
            try:
                async with nullcontext() if self._end is None else asyncio.timeout_at(self._end):
                    index, event = await self._events.get()
            except TimeoutError as error:
                raise too_late(self._seconds) from error
            if isinstance(event, RunError):
                raise event
            self.usage.answers[index] = event.tokens
            self._left -= event.ending is not None
            yield index, event

    def cancel(self) -> None:
        """Give up what has not ended."""
        for job in self._jobs:
            job.cancel()


async def read_request(engine: TextEngine, asked: CompletionRequest | ChatRequest, adapter: str | None) -> Questions:
    """What a request asks for, its prompts as token ids.

    Args:
        engine: The decoder.
        asked: The request.
        adapter: The key of the adapter that its model's name means; None for the base.

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
    rows: list[list[int]] = await run_in_threadpool(_read_prompts, engine, asked.prompts)
    requests: list[TextRequest] = []
    for ids in rows:
        source = None if engine.inputs is None else engine.inputs.of_ids(ids)
        prompt = tuple(ids) if source is None else (source.rules.start,)
        most = asked.most_tokens(queue.limits.context - len(prompt))
        if sampling.min_new_tokens > most:
            raise ServingError(f"min_tokens={sampling.min_new_tokens} is above the {most} tokens that are asked for")
        for _ in range(asked.n):
            own = seeded(sampling, len(requests))
            requests.append(TextRequest(prompt, most, own, stop, adapter, scores_prompt, source))
    echoes = [""] * len(requests)
    if asked.echo:
        texts = await run_in_threadpool(_prompt_texts, engine, asked.prompts)
        echoes = [text for text in texts for _ in range(asked.n)]
    return Questions(requests, echoes, sum(map(len, rows)))


def _read_prompts(engine: TextEngine, prompts: Sequence[Any]) -> list[list[int]]:
    return [prompt_ids(prompt, engine.tokenizer, ServingError) for prompt in prompts]


def _prompt_texts(engine: TextEngine, prompts: Sequence[Any]) -> list[str]:
    return [prompt if isinstance(prompt, str) else str(engine.tokenizer.decode(prompt)) for prompt in prompts]


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: Any) -> None:
    """Hand an event over from a scheduler's thread; to nobody, if the loop was closed while it came."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
