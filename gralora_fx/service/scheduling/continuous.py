"""Continuous batching: requests join and leave a decoder between its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from gralora_fx.base.amounts import shown_size
from gralora_fx.core.loading.text_tokenizer import TextTokenizer
from gralora_fx.run.engine.adapters import NotInvokedError
from gralora_fx.run.engine.cache_memory import NoRoomError
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.generate.answer_row import AnswerRow, NoProposals, Proposer, new_proposer
from gralora_fx.run.generate.completion import Completion, TextRequest
from gralora_fx.run.generate.request_errors import AdapterLoadError, DeadEndError
from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.scheduling.queue import JobQueue, Observer, trim_heap
from gralora_fx.service.scheduling.text_jobs import Sink, TextJob

_logger = logging.getLogger(__name__)


class ContinuousScheduler(JobQueue[TextJob]):
    """Runs requests in the rows of a decoder, each with its adapter.

    Before each step, rows of requests that ended or were cancelled are freed, and waiting requests take them. In a step
    every decoding row reads a token, and prompts share a token budget, earliest first, so that a long prompt does not
    delay the answers beside it. What the earliest prompt leaves of the budget goes to prompts that fit it whole: once
    begun, a prompt is the earliest, and has the budget to itself until it is read. A prompt longer than the budget is
    read alone in larger chunks while no row decodes.

    With a prefix cache, a prompt's beginning is taken from rows that have read it, or are reading it now, so that
    several answers to a prompt read it once.

    Attributes:
        limits: The model's limits.
        scores_prompts: Whether prompt tokens can be scored: the export has logits for every position.
        prefix_cache: Shares the caches of prompts with equal beginnings; None if there is none.
        memory: Memory of all caches.
        proposes: Whether tokens are proposed and verified.
    """

    unit = "requests"
    excess = "answers are asked for, n to each prompt", "ask for fewer"

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: TextTokenizer,
        observer: Observer,
        *,
        max_queue: int,
        models: AdapterStore | None = None,
        most_proposed: int | None = None,
    ) -> None:
        """Make a scheduler without requests."""
        super().__init__("gralora-fx text", observer, room=decoder.rows + max_queue, models=models)
        self.limits, self.scores_prompts = decoder.limits, decoder.gives_all
        self.prefix_cache, self.memory = decoder.prefix_cache, decoder.memory
        self._decoder, self._tokenizer = decoder, tokenizer
        self._rows: dict[int, TextJob] = {}
        self._is_short = False  # whether the oldest waiting request waits for memory
        proposer = new_proposer()
        self._most_proposed = proposer.most(most_proposed)
        self._proposer: Proposer = proposer if decoder.verify_problem is None else NoProposals()
        self.proposes = self._proposer is proposer and self._most_proposed > 0

    @property
    def running(self) -> int:
        """Number of rows in use."""
        return len(self._rows)

    @property
    def cache_usage(self) -> float:
        """Filled share of the rows' caches, or of their memory limit, from 0 to 1."""
        if self.memory.limit is not None:
            return min(self.memory.taken_by_rows / self.memory.limit, 1.0)
        filled = sum(job.read + len(job.answer.ids) for job in list(self._rows.values()))
        return min(filled / (self._decoder.rows * self._decoder.capacity), 1.0)

    def submit(self, requests: Sequence[tuple[TextRequest, Sink]]) -> list[TextJob]:
        """Queue requests, all or none."""
        self.check_count(len(requests))
        for request, _ in requests:
            request.check(self.limits)
            self._decoder.check_room(request.max_length, request.adapter, request.arrays)
            self._check_invoked(request)
        self._check_memory()
        jobs = []
        for request, sink in requests:
            options = request.options
            ends = options.ends(self.limits)
            answer = Completion(self._tokenizer, ends, options.stop, options.shown)
            jobs.append(TextJob(request, answer, ends, sink))
        self.put(jobs)
        return jobs

    def _check_invoked(self, request: TextRequest) -> None:
        """Check that a prompt has the tokens that activate its adapter."""
        try:
            self._decoder.start_of(request.adapter, request.prompt)
        except NotInvokedError as error:
            raise NotInvokedError(error.adapter, self._tokenizer.decode(error.adapter.acts_from)) from error

    def _check_memory(self) -> None:
        """Raise if the requests waiting for memory already need all of it."""
        limit = self.memory.limit
        if limit is None or not self._is_short:
            return
        with self._condition:
            waiting = [job.request for job in self._waiting if not job.is_cancelled]
        needed = sum(self._decoder.row_size(request.max_length, request.arrays) for request in waiting)
        if needed > limit:
            raise NoRoomError(
                f"{len(waiting)} requests wait for {shown_size(needed)} of caches, and max_memory has room for "
                f"{shown_size(limit)} at a time; ask again later, or for fewer tokens"
            )

    def _turn(self) -> None:
        self._free()
        self._admit()
        if not self._rows:
            return
        try:
            self._step()
        except Exception as error:  # a bug in the service: fail the requests, and serve later ones
            _logger.exception("a step ended halfway; its %d requests fail", len(self._rows))
            self._observer.failed()
            for job in self._rows.values():
                if not job.is_done:
                    job.fail(error)

    def _trim(self) -> None:
        self._decoder.trim()

    def _free(self) -> None:
        """Close the rows of requests that ended or were cancelled."""
        for row, job in list(self._rows.items()):
            if job.is_done or job.is_cancelled:
                self._decoder.close(row)
                del self._rows[row]
                self._leave(job)

    def _admit(self) -> None:
        """Assign free rows to waiting requests."""
        is_short = False
        while self._decoder.free and (job := self._next()) is not None:
            source = job.request.source
            try:
                if is_short := not self._decoder.has_room(job.request.max_length, job.adapter, job.request.arrays):
                    with self._condition:
                        self._waiting.appendleft(job)
                    break
                job.begin(self._proposer)  # before a row is taken
                start = self._decoder.start_of(job.adapter, job.request.prompt)
                job.start = start or 0
                row = self._decoder.open(
                    job.adapter,
                    job.request.arrays,
                    salt=job.request.options.salt,
                    max_length=job.request.max_length,
                    start=start,
                )
                self._decoder.expect(row, len(job.request.prompt))
                if not job.request.options.scores_prompt:  # every position's logits are wanted then
                    job.skip(self._decoder.fill(row, job.request.prompt))  # so that others share the prompt's beginning
            except Exception as error:  # noqa: BLE001  # it is told and logged
                self._fail(job, error, "a request cannot be run")
                self._leave(job)
                continue
            self._rows[row] = job
            if source is not None:
                self._observer.read(len(source.ids or ()))
                break  # an encoder has run while decoding rows waited; the next runs after their step
        self._is_short = is_short

    def _next(self) -> TextJob | None:
        """Return the next waiting request that is not cancelled; None if there is none."""
        with self._condition:
            while self._waiting:
                job = self._waiting.popleft()
                if not job.is_cancelled:
                    return job
                self._leave(job)
        return None

    def _step(self) -> None:
        tokens = self._tokens()
        for job in (self._rows[row] for row in tokens):
            if job.times.reading is None:
                job.times.reading = time.perf_counter()
                self._observer.waited(job.times.reading - job.times.submitted)
        answering = self._answering(tokens)
        proposed = sum(len(row.proposed) for row in answering.values())
        last = {row: count for row, each in answering.items() if (count := each.wanted(len(tokens[row]))) is not None}
        started = time.perf_counter()
        try:
            logits = self._decoder.step(tokens, last)
        except Exception as error:
            _logger.exception("a step of %d rows failed", len(tokens))
            self._observer.failed()
            for row in tokens:  # other rows have read nothing, and continue
                self._rows[row].fail(error)
            return
        seconds = time.perf_counter() - started
        self._observer.ran(seconds, len(tokens))
        self._observer.read(sum(len(tokens[row]) for row in tokens if row not in answering))
        if len(answering) == len(tokens):
            self._proposer.ran(sum(map(len, tokens.values())), proposed, seconds)
        self._advance(tokens, logits)
        if len(answering) < len(tokens) and all(job.is_answering for job in self._rows.values()):
            trim_heap()  # free memory that only reading prompts needed
        for row, each in answering.items():
            if each.surplus:
                self._decoder.rewind(row, self._decoder.length(row) - each.surplus)
            self._proposer.settle(each, each.accepted)
        if proposed:
            self._observer.proposed(proposed, sum(each.accepted for each in answering.values()))

    def _tokens(self) -> dict[int, list[int]]:
        """Return the tokens that each row reads in the next step; rows without budget or memory are left out."""
        tokens: dict[int, list[int]] = {}
        budget, is_earliest = self._decoder.chunk, True
        is_awaited = any(job.is_answering for job in self._rows.values())
        for row, job in self._rows.items():
            if not job.is_answering:
                if not job.request.options.scores_prompt:
                    job.skip(self._decoder.fill(row, job.request.prompt[job.read :]))
                is_alone = is_earliest and not is_awaited and job.unread > budget
                part = job.next_tokens(self._decoder.alone if is_alone else budget)
                if not (is_earliest or job.unread <= budget) or not self._decoder.reserve(row, len(part)):
                    continue
                if is_alone:
                    return {row: part}
                tokens[row], is_earliest = part, False
                budget -= len(part)
            else:
                part = job.next_tokens(self._decoder.chosen)
                if self._decoder.reserve(row, len(part)):
                    tokens[row] = part
        answering, chunk = self._answering(tokens), self._decoder.chunk
        if len(answering) == len(tokens):  # proposed tokens would delay prompts
            self._proposer.propose(list(answering.values()), chunk, self._most_proposed)
            tokens = {row: each.next_tokens(self._decoder.chosen) for row, each in answering.items()}
        return tokens

    def _answering(self, tokens: Mapping[int, list[int]]) -> dict[int, AnswerRow]:
        """Return the answers of the stepped rows whose prompts are read."""
        jobs = {row: self._rows[row] for row in tokens}
        return {row: job.row for row, job in jobs.items() if job.is_answering and job.row is not None}

    def _advance(self, tokens: Mapping[int, list[int]], logits: Mapping[int, NDArray[Any]]) -> None:
        """Choose the next token of every row that has read its prompt; an error fails its own row only."""
        for row, read in tokens.items():
            job = self._rows[row]
            is_first = was_reading = not job.is_answering
            try:
                if self._models is not None:
                    self._models.check_outputs(job.adapter, logits[row])
                for choice in job.advance(len(read), logits[row], self._proposer.saw):
                    if is_first:
                        job.times.answering, is_first = time.perf_counter(), False
                        self._observer.began(job.times.answering - job.times.submitted)
                    before = len(job.answer.ids)
                    job.take(choice)
                    self._observer.generated(len(job.answer.ids) - before)
                if was_reading and not job.unread and not job.request.options.scores_prompt:
                    self._observer.looked_up(len(job.request.prompt), job.cached)
            except Exception as error:  # noqa: BLE001  # it is told and logged
                self._fail(job, error, "choosing a token failed")

    def _fail(self, job: TextJob, error: Exception, what: str) -> None:
        """Report an error to a job's caller and the log; one that is not the request's fault counts as a failure."""
        if isinstance(error, (DeadEndError, AdapterLoadError)):
            _logger.warning("%s: %s", what, error)
        else:
            _logger.error(what, exc_info=error)
            self._observer.failed()
        job.fail(error)
