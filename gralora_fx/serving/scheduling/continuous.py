"""Continuous batching: requests join and leave a decoder between its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.engine.decoder import Decoder
from gralora_fx.serving.adapter_versions import AdapterVersions
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.text_jobs import TextJob
from gralora_fx.serving.scheduling.text_queue import TextQueue, failure
from gralora_fx.serving.token_choice import Choice, TokenChooser

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
        self.choose = self.job.request.chooser(self.job.ends)

    @property
    def unread(self) -> int:
        """How many tokens of its prompt the row has not read."""
        return len(self.job.request.prompt) - self.read

    def next_tokens(self, most: int) -> list[int]:
        """The tokens to read in the next step: at most some of the prompt, or the one that was chosen last."""
        if self.last is not None:
            return [self.last]
        return list(self.job.request.prompt[self.read : self.read + most])

    def advance(self, count: int, logits: NDArray[Any]) -> Choice | None:
        """Take note of the tokens that were read; the next one, if the prompt has ended and the answer has tokens."""
        if self.last is None:
            if self.job.request.scores_prompt:
                self.job.prompt_scores += self.job.request.score_prompt(self.read, logits)
            self.read += count
            if self.unread:
                return None
            if not self.job.request.max_new_tokens:
                self.job.finish("length")
                return None
        choice = self.choose(logits if logits.ndim == 1 else logits[-1])
        self.last = choice.token
        return choice


class ContinuousScheduler(TextQueue):
    """Runs requests in the rows of a decoder, each with its adapter.

    Before each step rows of requests that have ended or were given up are freed, and requests that wait take them. In a
    step every row that decodes reads a token, and prompts share a budget of tokens, the earliest first, so that a long
    prompt does not hold up the answers beside it. What the earliest leaves of the budget goes to prompts that fit it as
    a whole: a prompt that has begun is the earliest, and has the budget to itself until it is read.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        observer: Observer,
        *,
        max_queue: int,
        versions: AdapterVersions | None = None,
    ) -> None:
        """Make a scheduler without requests.

        Args:
            decoder: The decoder, all of whose rows are free; nobody else uses it.
            tokenizer: Decodes answers.
            observer: Is told what runs.
            max_queue: The most requests that may wait for a row.
            versions: As of `TextQueue`.
        """
        super().__init__(
            tokenizer,
            decoder.limits,
            observer,
            room=decoder.rows + max_queue,
            scores_prompts=decoder.gives_all,
            versions=versions,
        )
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
            source = job.request.source
            try:
                running = _Running(job)  # before a row is taken: a model's own rules may not go with the request
                row = self._decoder.open(job.request.adapter, None if source is None else source.arrays)
            except Exception as error:
                _logger.exception("a request cannot be run")
                self._observer.failed()
                job.fail(failure(error))
                self._left(job)
                continue
            self._rows[row] = running
            if source is not None:
                self._observer.read(len(source.ids or ()))
                return  # an encoder has run, which the rows that decode have waited for; the next runs after their step

    def _step(self) -> None:
        tokens = self._tokens()
        for row in tokens:
            if not self._rows[row].read:
                self._read_first(self._rows[row].job)
        started = time.perf_counter()
        try:
            logits = self._decoder.step(tokens)
        except Exception as error:
            _logger.exception("a step of %d rows failed", len(tokens))
            self._observer.failed()
            for row in tokens:  # the others have read nothing, and go on
                self._rows[row].job.fail(failure(error))
            return
        self._observer.ran(time.perf_counter() - started, len(tokens))
        self._observer.read(sum(len(tokens[row]) for row in tokens if self._rows[row].last is None))
        self._advance(tokens, logits)

    def _advance(self, tokens: Mapping[int, list[int]], logits: Mapping[int, NDArray[Any]]) -> None:
        """Choose the next token of every row that has read all of its prompt; a row that fails fails alone."""
        for row, given in tokens.items():
            running = self._rows[row]
            try:
                choice = running.advance(len(given), logits[row])
                if choice is not None:
                    self._take(running.job, choice)
            except Exception as error:
                _logger.exception("choosing a token failed")
                self._observer.failed()
                running.job.fail(failure(error))

    def _tokens(self) -> dict[int, list[int]]:
        """What each row reads in the next step; prompts that the budget does not reach rest."""
        tokens: dict[int, list[int]] = {}
        budget = self._decoder.chunk
        is_earliest = True
        for row, running in self._rows.items():
            if running.last is None:
                if is_earliest or running.unread <= budget:
                    tokens[row] = running.next_tokens(budget)
                    budget -= len(tokens[row])
                is_earliest = False
            else:
                tokens[row] = running.next_tokens(1)
        return tokens
