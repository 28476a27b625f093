"""A bounded queue of requests, and the thread that works on them."""

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
    """Is told what a scheduler does, for metrics; called from its thread."""

    def waited(self, seconds: float) -> None:
        """A request, or a row of one, waited before the first of its tokens was read."""

    def began(self, seconds: float) -> None:
        """The first token of an answer was chosen, so long after its request."""

    def ran(self, seconds: float, rows: int) -> None:
        """A batch ran."""

    def read(self, tokens: int) -> None:
        """Tokens of prompts or texts were read."""

    def looked_up(self, tokens: int, found: int) -> None:
        """A prompt of some tokens is there, of which some were found in the prefix cache."""

    def generated(self, tokens: int) -> None:
        """New tokens were chosen."""

    def proposed(self, tokens: int, accepted: int) -> None:
        """A step verified tokens that were proposed, of which some were chosen."""

    def failed(self) -> None:
        """A run failed, other than for a request that is wrong."""


class Job(Protocol):
    """What waits in a queue."""

    @property
    def rows(self) -> int:
        """How much of the queue's room it takes."""

    @property
    def adapter(self) -> str | None:
        """The key of the adapter that it runs with; None for the base."""

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller has gone."""


_Job = TypeVar("_Job", bound=Job)


class JobQueue(ABC, Generic[_Job]):
    """Takes jobs of any thread up to a bound, and works on them in a thread of its own.

    The adapter of each job is held while the job waits or runs. Told to stop, the queue takes nothing more, and its
    thread ends once nothing is left.

    Attributes:
        room: The most rows of jobs that may run or wait at a time.
        unit: What a row is called in messages.
        excess: What was asked for that there is never room for, and how to ask for less.
    """

    unit: ClassVar[str]
    excess: ClassVar[tuple[str, str]]

    def __init__(self, name: str, observer: Observer, *, room: int, models: AdapterStore | None = None) -> None:
        """Make an empty queue with room for some rows of jobs; `start` starts its thread."""
        self.room = room
        self._observer, self._models = observer, models
        self._waiting: deque[_Job] = deque()
        self._condition = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more, finish what is there, and end."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many rows of jobs wait."""
        with self._condition:
            return sum(job.rows for job in self._waiting if not job.is_cancelled)

    @property
    def in_flight(self) -> int:
        """How many rows of jobs run or wait, with those that were given up and not removed yet."""
        with self._condition:  # a caller may hold it already
            return sum(job.rows for job in self._waiting) + self.running

    @property
    @abstractmethod
    def running(self) -> int:
        """How many rows of jobs run."""

    @property
    def cache_usage(self) -> float:
        """The share of caches that is filled, from 0 to 1; 0 of what has none."""
        return 0.0

    @abstractmethod
    def _turn(self) -> None:
        """Do some work; called in the queue's thread while a job runs or waits."""

    def check_count(self, rows: int) -> None:
        """Check that there is ever room for so many rows at a time; before they are read, which takes time.

        Raises:
            TooLargeError: There is not.
        """
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
            ServingError: They are more than there is ever room for, or an adapter is gone.
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
        """Let a job's adapter go; called once for each job, when it neither waits nor runs any more."""
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
        """Free memory that only running jobs need; called in the queue's thread while there are none."""

    def _wait(self, seconds: float | None) -> bool:
        """Wait until there are jobs or the queue is to stop, for so many seconds at most; return whether it is so."""
        with self._condition:
            return bool(self._condition.wait_for(lambda: self._waiting or self.running or self._is_stopping, seconds))


def trim_heap() -> None:
    """Give back memory that was freed and that glibc keeps for later; other allocators are left alone."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
