"""A bounded queue of jobs and its worker thread."""

from __future__ import annotations

import ctypes
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

from gralora_fx.run.engine.limits import TooLargeError
from gralora_fx.run.generate.request_errors import QueueFullError, StoppedError
from gralora_fx.service.adapter_store.store import AdapterStore

_IDLE = 1.0  # seconds without jobs after which memory is freed


class Observer(Protocol):
    """Receives a scheduler's events for metrics; called from its thread."""

    def waited(self, seconds: float) -> None:
        """Record how long a request, or a row of one, waited until its first token was read."""

    def began(self, seconds: float) -> None:
        """Record the time to first token."""

    def ran(self, seconds: float, rows: int) -> None:
        """Record a batch."""

    def read(self, tokens: int) -> None:
        """Count tokens read from prompts or texts."""

    def looked_up(self, tokens: int, found: int) -> None:
        """Count a prompt's tokens, and those of them found in the prefix cache."""

    def generated(self, tokens: int) -> None:
        """Count generated tokens."""

    def proposed(self, tokens: int, accepted: int) -> None:
        """Count the proposed tokens that a step verified, and those of them accepted."""

    def failed(self) -> None:
        """Count a failed run, other than for an invalid request."""


class Job(Protocol):
    """An entry of a queue."""

    @property
    def rows(self) -> int:
        """Room that it takes in the queue."""

    @property
    def adapter(self) -> str | None:
        """The key of its adapter; None for the base."""

    @property
    def is_cancelled(self) -> bool:
        """Return whether its caller has gone."""


_Job = TypeVar("_Job", bound=Job)


class JobQueue(ABC, Generic[_Job]):
    """Takes jobs from any thread up to a bound, and runs them in its own thread.

    A job's adapter is held while the job waits or runs. After `stop` the queue takes no jobs, and its thread ends
    once the queue is empty.

    Attributes:
        room: Maximum rows of running and waiting jobs.
        unit: The name of a row in messages.
        excess: Message for a request that never fits, and its remedy.
    """

    unit: ClassVar[str]
    excess: ClassVar[tuple[str, str]]

    def __init__(self, name: str, observer: Observer, *, room: int, models: AdapterStore | None = None) -> None:
        """Create an empty queue with room for some rows; `start` starts its thread."""
        self.room = room
        self._observer, self._models = observer, models
        self._waiting: deque[_Job] = deque()
        self._condition = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Refuse new jobs, finish those queued, and end the thread."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Number of rows that wait."""
        with self._condition:
            return sum(job.rows for job in self._waiting if not job.is_cancelled)

    @property
    def in_flight(self) -> int:
        """Number of rows that run or wait, including cancelled ones not removed yet."""
        with self._condition:  # a caller may hold it already
            return sum(job.rows for job in self._waiting) + self.running

    @property
    @abstractmethod
    def running(self) -> int:
        """Number of rows that run."""

    @property
    def cache_usage(self) -> float:
        """Filled share of caches, from 0 to 1; 0 without caches."""
        return 0.0

    @abstractmethod
    def _turn(self) -> None:
        """Do some work; called in the queue's thread while a job runs or waits."""

    def check_count(self, rows: int) -> None:
        """Raise a `TooLargeError` if so many rows can never be queued at once; call before tokenizing (slow)."""
        if rows > self.room:
            what, remedy = self.excess
            raise TooLargeError(
                f"{rows} {what}, and there is room for {self.room}; {remedy} at a time, or let more wait (--max-queue)"
            )

    def put(self, jobs: Sequence[_Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            QueueFullError: There is no room for all of them now.
            StoppedError: The queue is stopping.
            ServingError: They can never fit, or an adapter is gone.
        """
        rows = sum(job.rows for job in jobs)
        self.check_count(rows)
        with self._condition:
            if self._is_stopping:
                raise StoppedError("the service is stopping; ask another one")
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                if job.is_cancelled:
                    self._leave(job)
                else:
                    self._waiting.append(job)
            if self.in_flight + rows > self.room:
                raise QueueFullError(f"{self.in_flight} {self.unit} run or wait, and there is room for {self.room}")
            if self._models is not None:
                self._models.hold(*(job.adapter for job in jobs))
            self._waiting.extend(jobs)
            self._condition.notify_all()

    def _leave(self, job: _Job) -> None:
        """Release a job's adapter; called once per job, when it no longer waits or runs."""
        if self._models is not None:
            self._models.release(job.adapter)

    def _work(self) -> None:
        while True:
            if not self._wait(_IDLE):
                self._trim()
                trim_heap()
                self._wait(None)
            with self._condition:
                if not (self._waiting or self.running):
                    return
            self._turn()

    def _trim(self) -> None:
        """Free memory that only running jobs need; called in the queue's thread when there are none."""

    def _wait(self, seconds: float | None) -> bool:
        """Wait for jobs or a stop, for `seconds` at most; return whether either came."""
        with self._condition:
            return bool(self._condition.wait_for(lambda: self._waiting or self.running or self._is_stopping, seconds))


def trim_heap() -> None:
    """Release freed memory that glibc keeps; other allocators are left alone."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
