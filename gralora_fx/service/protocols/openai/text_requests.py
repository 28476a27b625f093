"""From requests of OpenAI's protocol to decoder requests: prompts as tokens, and sampling parameters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from gralora_fx.core.loading.tokenizers import is_chat, prompt_ids
from gralora_fx.errors import ServingError, concerning, option
from gralora_fx.run.engine.adapters import NotInvokedError
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.limits import PromptLimit, TooLargeError
from gralora_fx.run.generate.answer_options import AnswerOptions, stop_strings
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.run.generate.encoder_inputs import TextSources
from gralora_fx.run.generate.prompts import EncoderInput
from gralora_fx.run.generate.request_errors import WrongFieldError
from gralora_fx.service.engines import TextEngine
from gralora_fx.service.protocols.openai.answer_plan import AnswerPlan, AnswerReader
from gralora_fx.service.protocols.openai.requests import ChatRequest, CompletionRequest
from gralora_fx.service.protocols.openai.response_requests import ResponseRequest
from gralora_fx.service.protocols.openai.strict_model import OF_REASONING
from gralora_fx.service.replies import TextAnswers, timeout_of
from gralora_fx.service.spans import note_model

Asked: TypeAlias = CompletionRequest | ChatRequest | ResponseRequest
_COMPILING = 2  # constraints compiled at once, leaving threads and cores to other requests
_Read = TypeVar("_Read")
_ATTACHING = 2  # requests whose attachments are opened at once, which bounds memory
# a prompt's tokens, and the source that replaces some, or what an encoder reads with them
_Row: TypeAlias = tuple[list[int], Source | EncoderInput | None]


@dataclass(frozen=True)
class TextQuestions:
    """The decoder requests of one HTTP request."""

    requests: list[TextRequest]  # one for each answer; `n` in a row for each prompt
    prompt_tokens: int  # the tokens of the prompts, each counted once
    plan: AnswerPlan  # how the answers are constrained and parsed

    def reader(self) -> AnswerReader | None:
        """Return a parser of one answer; None for plain text."""
        return None if self.plan.reader is None else self.plan.reader()


class QuestionReader:
    """Reads requests for one decoder."""

    def __init__(self, engine: TextEngine) -> None:
        """Create the thread pools."""
        self._engine = engine
        self._sources = engine.inputs if isinstance(engine.inputs, TextSources) else None
        self._compiling = ThreadPoolExecutor(_COMPILING, "gralora-fx constraints")
        self._attaching = ThreadPoolExecutor(_ATTACHING, "gralora-fx attachments")

    async def ask(self, asked: Asked, request: Request) -> tuple[TextQuestions, TextAnswers]:
        """Tokenize and queue a request, with the adapter of its model name."""
        engine, seconds, begun = self._engine, timeout_of(request), time.monotonic()
        if asked.stream_options is not None and not asked.stream:
            problem = "stream_options has no effect without stream; give stream too, or leave it out"
            raise ServingError(problem).about("stream_options")
        async with engine.models.use(asked.model, seconds) as adapter:
            note_model(request.scope, asked.model, adapter)
            try:
                asks = await self._read(asked, adapter)
                answers = TextAnswers(engine.queue, asks.requests, asks.prompt_tokens, seconds, begun, each=asked.n)
            except NotInvokedError as error:  # the model holds the adapter under the name of its version
                raise NotInvokedError(error.adapter, error.text, asked.model).about(asked.prompt_field) from error
            except ServingError as error:
                if error.field is None and type(error) in (ServingError, TooLargeError):
                    error.about(asked.prompt_field)
                raise
        return asks, answers

    async def _read(self, asked: Asked, adapter: str | None) -> TextQuestions:
        """Build the decoder requests for an adapter key; None for the base."""
        engine, queue, prompts, reader = self._engine, self._engine.queue, asked.prompts, self._sources
        with concerning("n" if asked.n > 1 else asked.prompt_field):
            queue.check_count(len(prompts) * asked.n)
        if engine.reasons and (wrong := [name for name in asked.ignored() if name in OF_REASONING]):
            problem = f"{wrong[0]} is not supported for this model, which reasons as its template says; leave it out"
            raise ServingError(problem).about(wrong[0])
        if reader is not None:
            reader.check_texts(prompts)
            if asked.echo:
                problem = "echo has no effect: an encoder-decoder does not continue its prompt; leave it out"
                raise ServingError(problem).about("echo")
        scores_prompt = asked.echo and asked.top_scores is not None
        if scores_prompt and not queue.scores_prompts:
            raise ServingError(
                "echo with logprobs needs the logits of every position, and the export gives those of the last; export "
                f"the model with {option(logits='all')}, or leave one of them out"
            ).about("echo")
        with concerning("stop"):
            stop = stop_strings(() if asked.stop is None else asked.stop, engine.tokenizer)
        sampling = asked.sampling(queue.limits.ends)
        plan = await self._plan(asked)
        options = AnswerOptions(
            sampling, stop, plan.constraint, plan.shown, scores_prompt=scores_prompt, salt=asked.cache_salt
        )
        rows = await self._rows(prompts, asked, adapter)
        requests: list[TextRequest] = []
        for ids, given in rows:
            source = given if isinstance(given, EncoderInput) else None if reader is None else reader.of_ids(ids)
            prompt = tuple(ids) if source is None or source.ids is None else (source.rules.start,)
            replaced = None if isinstance(given, EncoderInput) else given
            most = asked.most_tokens(queue.limits.context - len(prompt))
            if sampling.min_new_tokens > most:
                problem = f"min_tokens={sampling.min_new_tokens} is above the {most} tokens that are asked for"
                raise ServingError(problem).about("min_tokens")
            for _ in range(asked.n):
                requests.append(TextRequest(prompt, most, options.of_answer(len(requests)), adapter, source, replaced))
        return TextQuestions(requests, sum(len(ids) for ids, _ in rows), plan)

    @property
    def _limit(self) -> PromptLimit:
        """The limit on a prompt's tokens."""
        return PromptLimit.of_context(self._engine.queue.limits) if self._sources is None else self._sources.sources

    async def _plan(self, asked: Asked) -> AnswerPlan:
        """Plan how the answers are constrained and parsed, in a thread."""
        if asked.is_plain:
            return AnswerPlan()
        return await asyncio.get_running_loop().run_in_executor(self._compiling, asked.plan, self._engine)

    async def _rows(self, prompts: Sequence[Any], asked: Asked, adapter: str | None) -> list[_Row]:
        """Return the tokens of prompts, each with the source that replaces its placeholder tokens, if any."""
        if not asked.attached:
            return await run_in_threadpool(self._text_rows, prompts, asked)
        fields, reader = [field for field, _ in asked.attached], self._engine.attachments
        if reader is None:
            raise WrongFieldError(fields[0], "this model reads text alone; leave it out")
        files = await run_in_threadpool(reader.files, asked.attached)
        loop = asyncio.get_running_loop()
        return [
            await loop.run_in_executor(self._attaching, self._attached_row, prompts[0], fields, files, asked, adapter)
        ]

    def _attached_row(
        self, chat: Any, fields: Sequence[str], files: Sequence[bytes], asked: Asked, adapter: str | None
    ) -> _Row:
        """Return the row of a chat with attachments."""
        reader, limit = self._engine.attachments, self._limit
        assert reader is not None
        opened = reader.opened(files, fields)
        row = self._first_taken(
            chat, asked, lambda form, described: reader.read(form, described, opened, adapter, limit)
        )
        limit.check_tokens(row[0])
        return row

    def _text_rows(self, prompts: Sequence[Any], asked: Asked) -> list[_Row]:
        """Return the rows of text-only prompts."""
        limit = self._limit
        rows: list[_Row] = []
        for prompt in prompts:
            ids = self._ids(prompt, asked, limit)
            limit.check_tokens(ids)  # stop at the first prompt that is too long
            rows.append((ids, None))
        return rows

    def _ids(self, prompt: Any, asked: Asked, limit: PromptLimit) -> list[int]:
        """Tokenize a prompt."""
        tokenizer, reader = self._engine.tokenizer, self._engine.attachments

        def ids(prompt: Any, described: Sequence[Any] = ()) -> list[int]:  # after features have changed texts
            form = prompt if reader is None else reader.form(prompt)
            return prompt_ids(form, tokenizer, ServingError, described, limit.check_text)

        return self._first_taken(prompt, asked, ids) if is_chat(prompt) else ids(prompt)

    def _first_taken(self, chat: Any, asked: Asked, read: Callable[[Any, Sequence[Any]], _Read]) -> _Read:
        """Read a chat in its first form that the template accepts; raise the first form's error if none is."""
        problem: ServingError | None = None
        for form, described in asked.chats(chat, self._engine):
            try:
                return read(form, described)
            except TooLargeError:
                raise
            except ServingError as error:
                problem = problem or error
        assert problem is not None  # there is one attempt at least
        raise problem
