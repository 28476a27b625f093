"""A request for text on its way through a scheduler, and what its caller is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gralora_fx.errors import ServingError, shown
from gralora_fx.serving.answer import Answer
from gralora_fx.serving.sampling import Sampling
from gralora_fx.serving.scheduling.failures import RunError
from gralora_fx.serving.too_large import TooLargeError

Ending: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class TextRequest:
    """A prompt to answer.

    Attributes:
        prompt: Its token ids.
        max_new_tokens: The most tokens to add.
        sampling: How tokens are chosen; its own `max_new_tokens` is not used.
        stop: Strings that end the answer, checked.
        adapter: The adapter to answer with; None for the base.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    adapter: str | None = None


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer.

    Attributes:
        text: New text; empty while it may be the beginning of a stop string or of a letter.
        tokens: How many new tokens the answer has now.
        ending: Why the answer has ended; None while it goes on.
    """

    text: str
    tokens: int
    ending: Ending | None = None


Sink: TypeAlias = Callable[[Piece | RunError], None]


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        context: Positions of a prompt and its answer together.
        vocabulary: How many tokens there are; None if the configuration does not say.
    """

    context: int
    vocabulary: int | None

    def check(self, request: TextRequest) -> None:
        """Check that a request can be run.

        Raises:
            ServingError: The prompt is empty, too long, or holds ids outside the vocabulary.
        """
        length = len(request.prompt)
        if not length:
            raise ServingError("the prompt has no tokens; give at least one")
        most = self.vocabulary
        wrong = [token for token in request.prompt if token < 0 or (most is not None and token >= most)]
        if wrong:
            raise ServingError(f"the prompt holds token {shown(wrong[0])}, outside the vocabulary of {most} tokens")
        if length + request.max_new_tokens > self.context:
            raise TooLargeError(
                f"the prompt has {length} tokens and {shown(request.max_new_tokens)} more are asked for, beyond the "
                f"context of {self.context} tokens; shorten the prompt, or ask for fewer"
            )


class TextJob:
    """A request, the answer so far and its caller.

    Attributes:
        request: The request.
        answer: The answer so far.
        is_done: Whether its caller was told the end.
    """

    def __init__(self, request: TextRequest, answer: Answer, sink: Sink) -> None:
        """Start a job.

        Args:
            request: The request, checked.
            answer: An empty answer.
            sink: Is called with each piece, the last of which has an ending, or with the error that ends the job.
        """
        self.request, self.answer = request, answer
        self.is_done = False
        self._sink, self._cancelled = sink, threading.Event()
        self._submitted = time.perf_counter()

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller has gone."""
        return self._cancelled.is_set()

    @property
    def age(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self._submitted

    def cancel(self) -> None:
        """Give the job up; its row is free at the next step."""
        self._cancelled.set()

    def take(self, token: int) -> None:
        """Add a token to the answer, and tell the caller."""
        text = self.answer.take(token)
        ending: Ending | None = "stop" if self.answer.has_ended else None
        if ending is None and len(self.answer.ids) >= self.request.max_new_tokens:
            self.finish("length", text)
            return
        self._tell(text, ending)

    def finish(self, ending: Ending, text: str = "") -> None:
        """End the answer, and tell the caller.

        Args:
            ending: Why it ends.
            text: New text before what is held back.
        """
        rest = self.answer.finish()
        self._tell(text + rest, ending)

    def fail(self, error: RunError) -> None:
        """Tell the caller that the job cannot be done."""
        self.is_done = True
        self._sink(error)

    def _tell(self, text: str, ending: Ending | None) -> None:
        self.is_done = ending is not None
        if text or self.is_done:
            self._sink(Piece(text, len(self.answer.ids), ending))
