"""The bounded queue of requests for text, and the thread that works on them."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gralora_fx.engine.limits import DecoderLimits
from gralora_fx.errors import ServingError
from gralora_fx.serving.adapter_versions import AdapterVersions
from gralora_fx.serving.answer import Answer
from gralora_fx.serving.scheduling.failures import QueueFullError, RunError
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.text_jobs import Sink, TextJob, TextRequest
from gralora_fx.serving.scheduling.worker import Worker
from gralora_fx.serving.token_choice import Choice
from gralora_fx.serving.too_large import TooLargeError


class TextQueue(Worker):
    """Takes requests of any thread, and works on them in one of its own.

    Attributes:
        limits: What the model can take.
        room: The most requests that may run or wait at a time.
        scores_prompts: Whether tokens of prompts can be scored: the export gives the logits of every position.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: DecoderLimits,
        observer: Observer,
        *,
        room: int,
        scores_prompts: bool,
        versions: AdapterVersions | None = None,
    ) -> None:
        """Make an empty queue; `start` starts its thread.

        Args:
            tokenizer: Decodes answers.
            limits: What the model can take.
            observer: Is told what runs.
            room: The most requests that may run or wait at a time.
            scores_prompts: Whether tokens of prompts can be scored.
            versions: The adapters, each of which is held while a request with it waits or runs; None if they stay.
        """
        super().__init__("gralora-fx text")
        self.limits, self.room, self.scores_prompts = limits, room, scores_prompts
        self._tokenizer, self._observer = tokenizer, observer
        self._waiting: deque[TextJob] = deque()
        self._versions = versions

    def submit(self, requests: Sequence[tuple[TextRequest, Sink]]) -> list[TextJob]:
        """Queue requests, all or none.

        Args:
            requests: Each with the function to call with its pieces, from the queue's thread.

        Raises:
            QueueFullError: There is no room for all of them now.
            StoppedError: The queue is stopping.
            ServingError: One of them cannot be run, or they are more than there is ever room for.
        """
        self.check_count(len(requests))
        for request, _ in requests:
            request.check(self.limits)
        jobs = [self._job(request, sink) for request, sink in requests]
        with self._condition:
            self._check_takes()
            self._drop_cancelled()
            if self.in_flight + len(jobs) > self.room:
                raise QueueFullError(f"{self.in_flight} requests run or wait, and there is room for {self.room}")
            self._hold(jobs)
            self._waiting.extend(jobs)
            self._condition.notify_all()
        return jobs

    def check_count(self, count: int) -> None:
        """Check that there is ever room for so many requests at a time; before they are read, which takes time.

        Raises:
            TooLargeError: There is not.
        """
        if count > self.room:
            raise TooLargeError(
                f"{count} answers are asked for, n to each prompt, and there is room for {self.room}; ask for fewer "
                "at a time, or let more wait (--max-queue)"
            )

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
                    return job
                self._left(job)
        return None

    def _drop_cancelled(self) -> None:
        """Take jobs that were given up out of those that wait; called with the condition held."""
        kept: deque[TextJob] = deque()
        for job in self._waiting:
            if job.is_cancelled:
                self._left(job)
            else:
                kept.append(job)
        self._waiting = kept

    def _hold(self, jobs: Sequence[TextJob]) -> None:
        """Keep the adapters of new jobs, all or none."""
        if self._versions is not None:
            self._versions.hold(*(job.request.adapter for job in jobs))

    def _left(self, job: TextJob) -> None:
        """Let a job's adapter go; called once for each job, when it neither waits nor runs any more."""
        if self._versions is not None:
            self._versions.release(job.request.adapter)

    def _read_first(self, job: TextJob) -> None:
        """Take note that the first tokens of a request are read."""
        job.waited = job.age
        self._observer.waited(job.waited)

    def _take(self, job: TextJob, choice: Choice) -> None:
        """Add a token to an answer, and tell its caller and the observer."""
        if not job.is_begun:
            job.is_begun = True
            self._observer.began(job.age, job.waited)
        before = len(job.answer.ids)
        job.take(choice)
        self._observer.generated(len(job.answer.ids) - before)

    def _job(self, request: TextRequest, sink: Sink) -> TextJob:
        ends = self.limits.ends if request.sampling.ends is None else request.sampling.ends
        return TextJob(request, Answer(self._tokenizer, ends, request.stop), ends, sink)


def failure(error: Exception) -> RunError:
    """What a caller is told of an error while its request ran."""
    return RunError(str(error) if isinstance(error, ServingError) else "the request failed; the server's log says why")
