"""Continuous batching: requests join and leave a batched decoder between its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.serving.adapter_versions import AdapterVersions
from gralora_fx.serving.batched_decoder import BatchedDecoder
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.text_jobs import Limits, TextJob
from gralora_fx.serving.scheduling.text_queue import TextQueue, failure
from gralora_fx.serving.token_choice import TokenChooser

_logger = logging.getLogger(__name__)


@dataclass
class _Running:
    """A job in a row of the decoder.

    Attributes:
        job: The job.
        choose: Chooses its tokens.
        read: How many tokens of its prompt the row has read.
        last: The token that was chosen last and not read yet.
    """

    job: TextJob
    choose: TokenChooser = field(init=False)
    read: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        self.choose = TokenChooser(self.job.request.sampling)

    def next_tokens(self, most: int) -> list[int]:
        """The tokens to read in the next step: at most some of the prompt, or the one that was chosen last."""
        if self.last is not None:
            return [self.last]
        return list(self.job.request.prompt[self.read : self.read + most])

    def advance(self, count: int, logits: NDArray[Any]) -> None:
        """Take note of the tokens that were read, and choose the next if the prompt has ended."""
        if self.last is None:
            self.read += count
            if self.read < len(self.job.request.prompt):
                return
        ids = (*self.job.request.prompt, *self.job.answer.ids)
        self.last = self.choose(ids, logits if logits.ndim == 1 else logits[-1])
        self.job.take(self.last)


class ContinuousScheduler(TextQueue):
    """Runs requests in the rows of a batched decoder, each with its adapter.

    Before each step rows of requests that have ended or were given up are freed, and requests that wait take them. In a
    step every row that decodes reads a token, and prompts share a budget of tokens, the earliest first, so that a long
    prompt does not hold up the answers beside it.
    """

    def __init__(
        self,
        decoder: BatchedDecoder,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int],
        vocabulary: int | None,
        observer: Observer,
        *,
        max_queue: int,
        versions: AdapterVersions | None = None,
    ) -> None:
        """Make a scheduler without requests.

        Args:
            decoder: The decoder, all of whose rows are free; nobody else uses it.
            tokenizer: Decodes answers.
            ends: Ids of the tokens that end an answer.
            vocabulary: How many tokens there are; None if that is not known.
            observer: Is told what runs.
            max_queue: The most requests that may wait for a row.
            versions: As of `TextQueue`.
        """
        limits = Limits(decoder.capacity, vocabulary)
        super().__init__(tokenizer, ends, limits, observer, room=decoder.rows + max_queue, versions=versions)
        self._decoder = decoder
        self._rows: dict[int, _Running] = {}

    @property
    def running(self) -> int:
        """How many rows are in use."""
        return len(self._rows)

    def _turn(self) -> None:
        self._free()
        self._admit()
        if self._rows:
            self._step()

    def _free(self) -> None:
        """Close the rows of requests that have ended or were given up."""
        for row, running in list(self._rows.items()):
            if running.job.is_done or running.job.is_cancelled:
                self._decoder.close(row)
                del self._rows[row]
                self._left(running.job)

    def _admit(self) -> None:
        """Give free rows to requests that wait."""
        while self._decoder.free and (job := self._next()) is not None:
            try:
                row = self._decoder.open(job.request.adapter)
            except Exception as error:
                _logger.exception("a request cannot be run")
                self._observer.failed()
                job.fail(failure(error))
                self._left(job)
                continue
            self._rows[row] = _Running(job)

    def _step(self) -> None:
        tokens = self._tokens()
        started = time.perf_counter()
        try:
            logits = self._decoder.step(tokens)
        except Exception as error:
            _logger.exception("a step of %d rows failed", len(tokens))
            self._observer.failed()
            for running in self._rows.values():
                running.job.fail(failure(error))
            return
        self._observer.ran(time.perf_counter() - started, len(tokens))
        self._observer.read(sum(len(tokens[row]) for row in tokens if self._rows[row].last is None))
        self._advance(tokens, logits)

    def _advance(self, tokens: Mapping[int, list[int]], logits: Mapping[int, NDArray[Any]]) -> None:
        """Choose the next token of every row that has read all of its prompt; a row that fails fails alone."""
        for row, given in tokens.items():
            running = self._rows[row]
            before = len(running.job.answer.ids)
            try:
                running.advance(len(given), logits[row])
            except Exception as error:
                _logger.exception("choosing a token failed")
                self._observer.failed()
                running.job.fail(failure(error))
            self._observer.generated(len(running.job.answer.ids) - before)

    def _tokens(self) -> dict[int, list[int]]:
        """What each row reads in the next step; prompts that the budget does not reach rest."""
        tokens: dict[int, list[int]] = {}
        budget = self._decoder.chunk
        for row, running in self._rows.items():
            given = running.next_tokens(budget)
            if running.last is None:
                budget -= len(given)
            if given:
                tokens[row] = given
        return tokens
