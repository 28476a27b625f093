"""The bounded queue of requests for text, and the thread that works on them."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gralora_fx.errors import ServingError
from gralora_fx.serving.answer import Answer
from gralora_fx.serving.scheduling.failures import QueueFullError, RunError
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.text_jobs import Limits, Sink, TextJob, TextRequest
from gralora_fx.serving.scheduling.worker import Worker
from gralora_fx.serving.too_large import TooLargeError


class TextQueue(Worker):
    """Takes requests of any thread, and works on them in one of its own.

    Attributes:
        limits: What the model can take.
        room: The most requests that may run or wait at a time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int],
        limits: Limits,
        observer: Observer,
        *,
        room: int,
    ) -> None:
        """Make an empty queue; `start` starts its thread.

        Args:
            tokenizer: Decodes answers.
            ends: Ids of the tokens that end an answer.
            limits: What the model can take.
            observer: Is told what runs.
            room: The most requests that may run or wait at a time.
        """
        super().__init__("gralora-fx text")
        self.limits, self.room = limits, room
        self._tokenizer, self._ends, self._observer = tokenizer, ends, observer
        self._waiting: deque[TextJob] = deque()

    def submit(self, requests: Sequence[tuple[TextRequest, Sink]]) -> list[TextJob]:
        """Queue requests, all or none.

        Args:
            requests: Each with the function to call with its pieces, from the queue's thread.

        Raises:
            QueueFullError: There is no room for all of them now.
            StoppedError: The queue is stopping.
            ServingError: One of them cannot be run, or they are more than there is ever room for.
        """
        for request, _ in requests:
            self.limits.check(request)
        if len(requests) > self.room:
            raise TooLargeError(f"{len(requests)} prompts are given, and there is room for {self.room}; give fewer")
        jobs = [TextJob(request, Answer(self._tokenizer, self._ends, request.stop), sink) for request, sink in requests]
        with self._condition:
            self._check_takes()
            self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
            if self.in_flight + len(jobs) > self.room:
                raise QueueFullError(f"{self.in_flight} requests run or wait, and there is room for {self.room}")
            self._waiting.extend(jobs)
            self._condition.notify_all()
        return jobs

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        with self._condition:
            return sum(not job.is_cancelled for job in self._waiting)

    @property
    def in_flight(self) -> int:
        """How many requests run or wait."""
        return len(self._waiting) + self.running

    @property
    @abstractmethod
    def running(self) -> int:
        """How many requests run."""

    @abstractmethod
    def _turn(self) -> None:
        """Do some work; called while a request runs or waits."""

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self.running or self._is_stopping)
                if not (self._waiting or self.running):
                    return
            self._turn()

    def _next(self) -> TextJob | None:
        """The next request that waits for an answer; None if none does."""
        with self._condition:
            while self._waiting:
                job = self._waiting.popleft()
                if not job.is_cancelled:
                    self._observer.waited(job.age)
                    return job
        return None


def failure(error: Exception) -> RunError:
    """What a caller is told of an error while its request ran."""
    return RunError(str(error) if isinstance(error, ServingError) else "the request failed; the server's log says why")
