"""A request for text on its way through a scheduler, and what its caller is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from numpy.typing import NDArray

from gralora_fx.run.engine.decoder import part_length
from gralora_fx.run.generate.answer_row import AnswerRow, Proposer
from gralora_fx.run.generate.completion import Completion, Ending, TextRequest
from gralora_fx.run.generate.request_errors import RunError
from gralora_fx.run.generate.token_choice import Choice, TokenScore


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer."""

    text: str  # new text; empty while it may be the beginning of a stop string or of a letter
    tokens: int  # how many new tokens the answer has now
    ending: Ending | None = None  # why the answer has ended; None while it goes on
    scores: tuple[TokenScore, ...] = ()  # those of the new tokens, if they are asked for
    # those of the prompt's tokens but the first, in the first piece, if they are asked for
    prompt_scores: tuple[TokenScore, ...] = ()
    cached: int = 0  # how many tokens of the prompt were taken over from the prefix cache

    def __add__(self, later: Piece) -> Piece:
        """This piece with the next one."""
        return Piece(
            self.text + later.text,
            later.tokens,
            later.ending,
            self.scores + later.scores,
            self.prompt_scores + later.prompt_scores,
            later.cached,
        )


@dataclass
class JobTimes:
    """When a job reached each stage, in seconds of `time.perf_counter`; None for one that it has not reached."""

    submitted: float  # it was queued
    reading: float | None = None  # the first tokens of its prompt are read, or found in a cache
    answering: float | None = None  # the first token of its answer was chosen
    ended: float | None = None  # its caller was told the end


Sink: TypeAlias = Callable[[Piece | RunError], None]


class TextJob:
    """A request, the answer so far and its caller; once it runs, also the row of the decoder.

    Attributes:
        request: The request.
        answer: The answer so far.
        is_done: Whether its caller was told the end.
        read: How many tokens of its prompt the row has read, or taken over.
        cached: How many of them it has taken over from the prefix cache.
        row: The answer as the decoder's row reads it, once the job has begun.
        is_answering: Whether its prompt is read, so that it reads what was chosen.
        times: When it reached each stage.
    """

    rows = 1

    def __init__(self, request: TextRequest, answer: Completion, ends: frozenset[int], sink: Sink) -> None:
        """Start a job."""
        self.request, self.answer = request, answer
        self.is_done = False
        self.read = self.cached = 0
        self.row: AnswerRow | None = None
        self.is_answering = False
        self._ends, self._sink, self._cancelled = ends, sink, threading.Event()
        self._scores: list[TokenScore] = []
        self._prompt_scores: list[TokenScore] = []
        self.times = JobTimes(time.perf_counter())

    @property
    def adapter(self) -> str | None:
        """The key of the adapter that it runs with; None for the base."""
        return self.request.adapter

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller has gone."""
        return self._cancelled.is_set()

    @property
    def age(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self.times.submitted

    @property
    def unread(self) -> int:
        """How many tokens of its prompt the row has not read."""
        return len(self.request.prompt) - self.read

    def cancel(self) -> None:
        """Give the job up; its row is free at the next step."""
        self._cancelled.set()

    def skip(self, count: int) -> None:
        """Take note of tokens of the prompt that the row has taken over."""
        self.read += count
        self.cached += count

    def begin(self, proposer: Proposer) -> None:
        """Get ready to choose tokens; a model's own rules may raise here that do not go with the request."""
        request = self.request
        self.row = AnswerRow(request.chooser(self._ends), request.max_new_tokens, proposer.text(request.prompt))

    def next_tokens(self, most: int) -> list[int]:
        """The tokens to read in the next step: at most some of the prompt, or of those that were chosen last."""
        if self.is_answering:
            assert self.row is not None
            return self.row.next_tokens(most)
        return list(self.request.prompt[self.read : self.read + part_length(self.unread, most)])

    def advance(
        self, count: int, logits: NDArray[Any], saw: Callable[[int, bool], None] = lambda matched, is_proposed: None
    ) -> Iterator[Choice]:
        """Take note of the tokens that were read; the next ones, if all are read and the answer has tokens."""
        assert self.row is not None
        if self.is_answering:
            if not self.row.proposed and not self.row.read(count):
                return
        else:
            if self.request.options.scores_prompt:
                self._prompt_scores += self.request.score_prompt(self.read, logits)
            self.read += count
            if self.unread:
                return
            if not self.request.max_new_tokens:
                self._tell(self.answer.finish(), "length")
                return
            self.is_answering = True
        for choice in self.row.choices(logits, saw):
            yield choice
            if self.is_done:
                return

    def take(self, choice: Choice) -> None:
        """Add what was chosen to the answer, and tell the caller."""
        before = len(self.answer.ids)
        text = self.answer.extend(choice, self.request.max_new_tokens)
        if choice.score is not None and len(self.answer.ids) > before:
            self._scores.append(choice.score)
        self._tell(text, self.answer.ending)

    def fail(self, error: Exception) -> None:
        """Tell the caller that the job cannot be done."""
        self._end()
        self._sink(RunError.of(error))

    def _tell(self, text: str, ending: Ending | None) -> None:
        if ending is not None:
            self._end()
        if text or self.is_done or self._scores:
            scores, prompt_scores = tuple(self._scores), tuple(self._prompt_scores)
            self._scores, self._prompt_scores = [], []
            self._sink(Piece(text, len(self.answer.ids), ending, scores, prompt_scores, self.cached))

    def _end(self) -> None:
        self.is_done, self.times.ended = True, time.perf_counter()
