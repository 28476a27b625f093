"""A text request in a scheduler, and the pieces that its caller receives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from numpy.typing import NDArray

from gralora_fx.run.engine.limits import part_length
from gralora_fx.run.generate.answer_row import AnswerRow, Proposer
from gralora_fx.run.generate.completion import Completion, Ending, TextRequest
from gralora_fx.run.generate.request_errors import RunError
from gralora_fx.run.generate.token_choice import Choice, TokenScore


@dataclass(frozen=True)
class Piece:
    """The part that a step adds to an answer."""

    text: str  # new text; empty while it may begin a stop string or an incomplete character
    tokens: int  # number of new tokens in the answer so far
    ending: Ending | None = None  # finish reason; None while the answer continues
    scores: tuple[TokenScore, ...] = ()  # scores of the new tokens, if requested
    # scores of the prompt's tokens after the first, in the first piece, if requested
    prompt_scores: tuple[TokenScore, ...] = ()
    cached: int = 0  # number of prompt tokens taken from the prefix cache

    def __add__(self, later: Piece) -> Piece:
        """Join this piece with the next one."""
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
    """Times at which a job reached each stage, in `time.perf_counter` seconds; None if not yet."""

    submitted: float  # it was queued
    reading: float | None = None  # the first tokens of its prompt were read, or found in a cache
    answering: float | None = None  # the first token of its answer was chosen
    ended: float | None = None  # its caller was notified of the end


Sink: TypeAlias = Callable[[Piece | RunError], None]


class TextJob:
    """A request, its answer so far and its caller; while it runs, also its decoder row.

    Attributes:
        request: The request.
        answer: The answer so far.
        is_done: Whether its caller was notified of the end.
        read: Number of prompt tokens read, or taken from the prefix cache.
        cached: Number of prompt tokens taken from the prefix cache.
        start: Number of prompt tokens that the base reads before the adapter acts.
        row: The answer as the decoder's row reads it, once the job has begun.
        is_answering: Whether its prompt is read, so that it reads chosen tokens.
        times: When it reached each stage.
    """

    rows = 1

    def __init__(self, request: TextRequest, answer: Completion, ends: frozenset[int], sink: Sink) -> None:
        """Start a job."""
        self.request, self.answer = request, answer
        self.is_done = False
        self.read = self.cached = self.start = 0
        self.row: AnswerRow | None = None
        self.is_answering = False
        self._ends, self._sink, self._cancelled = ends, sink, threading.Event()
        self._scores: list[TokenScore] = []
        self._prompt_scores: list[TokenScore] = []
        self.times = JobTimes(time.perf_counter())

    @property
    def adapter(self) -> str | None:
        """The key of its adapter; None for the base."""
        return self.request.adapter

    @property
    def is_cancelled(self) -> bool:
        """Return whether its caller has gone."""
        return self._cancelled.is_set()

    @property
    def age(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self.times.submitted

    @property
    def unread(self) -> int:
        """Number of prompt tokens not read yet."""
        return len(self.request.prompt) - self.read

    def cancel(self) -> None:
        """Cancel the job; its row is free at the next step."""
        self._cancelled.set()

    def skip(self, count: int) -> None:
        """Record prompt tokens taken from the prefix cache."""
        self.read += count
        self.cached += count

    def begin(self, proposer: Proposer) -> None:
        """Prepare sampling; logits processors of the model may raise here for parameters that they do not support."""
        request = self.request
        self.row = AnswerRow(request.chooser(self._ends), request.max_new_tokens, proposer.text(request.prompt))

    def next_tokens(self, most: int) -> list[int]:
        """Return at most `most` tokens to read next, of the prompt or of those chosen last."""
        if self.is_answering:
            assert self.row is not None
            return self.row.next_tokens(most)
        part = part_length(self.unread, most, self.start - self.read)
        return list(self.request.prompt[self.read : self.read + part])

    def advance(
        self, count: int, logits: NDArray[Any], saw: Callable[[int, bool], None] = lambda matched, is_proposed: None
    ) -> Iterator[Choice]:
        """Record `count` tokens read, and yield the tokens chosen once the prompt is read."""
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
        """Add chosen tokens to the answer, and send the piece to the caller."""
        before = len(self.answer.ids)
        text = self.answer.extend(choice, self.request.max_new_tokens)
        # an end token is no part of the answer, but whoever has the prompt scored counts on a score after it
        is_scored = len(self.answer.ids) > before or self.request.options.scores_prompt
        if choice.score is not None and is_scored:
            self._scores.append(choice.score)
        self._tell(text, self.answer.ending)

    def fail(self, error: Exception) -> None:
        """Report an error to the caller."""
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
