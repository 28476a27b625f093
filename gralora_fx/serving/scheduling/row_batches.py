"""Dynamic batching of single runs: what waits while a batch runs goes into the next one."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gralora_fx.errors import ServingError
from gralora_fx.serving.scheduling.failures import QueueFullError
from gralora_fx.serving.scheduling.observer import Observer
from gralora_fx.serving.scheduling.text_queue import failure
from gralora_fx.serving.scheduling.worker import Worker
from gralora_fx.serving.too_large import TooLargeError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowJob:
    """Rows to run.

    Attributes:
        key: Jobs of equal keys can be one batch.
        rows: How many rows.
        payload: What to run, for the function that runs batches.
        length: How long its rows are, where those of other lengths cost padding.
        result: Becomes the job's result; a job whose result is cancelled before it runs does not run.
    """

    key: Hashable
    rows: int
    payload: Any
    length: int = 0
    result: Future[Any] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)


class RowBatches(Worker):
    """Takes rows of any thread, and runs them in batches in a thread of its own, the earliest first.

    A batch is the job that has waited longest and those nearest to it in length.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        observer: Observer,
        *,
        max_batch: int,
        max_queue: int,
    ) -> None:
        """Make an empty queue; `start` starts its thread.

        Args:
            run: Runs payloads of one key as a batch, and returns the result of each.
            observer: Is told what runs.
            max_batch: The most rows of a batch; a job of more rows runs alone.
            max_queue: The most rows that may wait.
        """
        super().__init__("gralora-fx rows")
        self._run, self._observer = run, observer
        self.max_batch, self.room = max_batch, max_batch + max_queue
        self._waiting: deque[RowJob] = deque()
        self._running = 0

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        with self._condition:
            return sum(job.rows for job in self._waiting if not job.result.cancelled())

    def submit(self, jobs: Sequence[RowJob]) -> None:
        """Queue jobs, all or none.

        Raises:
            QueueFullError: There is no room for all of them now.
            StoppedError: The queue is stopping.
            ServingError: They have more rows than there is ever room for.
        """
        new = sum(job.rows for job in jobs)
        self.check_count(new)
        with self._condition:
            self._check_takes()
            if self._held() + new > self.room:
                self._waiting = deque(job for job in self._waiting if not job.result.cancelled())
            rows = self._held()
            if rows + new > self.room:
                raise QueueFullError(f"{rows} rows run or wait, and there is room for {self.room}")
            self._waiting.extend(jobs)
            self._condition.notify_all()

    def check_count(self, rows: int) -> None:
        """Check that there is ever room for so many rows at a time; before they are read, which takes time.

        Raises:
            TooLargeError: There is not.
        """
        if rows > self.room:
            raise TooLargeError(
                f"{rows} rows are given, and there is room for {self.room}; give fewer at a time, or let more wait "
                "(--max-queue)"
            )

    def _held(self) -> int:
        """How many rows run or wait, with those that were given up and not removed yet."""
        return self._running + sum(job.rows for job in self._waiting)

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._is_stopping)
                if not self._waiting:
                    return
                batch = self._take()
                self._running = sum(job.rows for job in batch)
            for job in batch:
                self._observer.waited(time.perf_counter() - job.submitted)
            if batch:
                self._run_batch(batch)
            self._running = 0

    def _take(self) -> list[RowJob]:
        """The first job that waits, and of those of its key the nearest in length, as far as there is room.

        Since the first one always runs, a job waits for at most as many batches as there were jobs before it.
        """
        batch: list[RowJob] = []
        while self._waiting and not batch:
            first = self._waiting.popleft()
            if first.result.set_running_or_notify_cancel():
                batch.append(first)
        if not batch:
            return batch
        rows, gone = first.rows, set[int]()
        mates = (job for job in self._waiting if job.key == first.key)
        for job in sorted(mates, key=lambda job: abs(job.length - first.length)):
            if rows + job.rows > self.max_batch:
                continue
            gone.add(id(job))
            if job.result.set_running_or_notify_cancel():
                batch.append(job)
                rows += job.rows
        self._waiting = deque(job for job in self._waiting if id(job) not in gone)
        return batch

    def _run_batch(self, batch: Sequence[RowJob]) -> None:
        started = time.perf_counter()
        try:
            results = self._run([job.payload for job in batch])
        except Exception as error:
            if len(batch) > 1:  # one of them may be wrong; the others are not
                for job in batch:
                    self._run_batch([job])
            elif isinstance(error, ServingError):
                batch[0].result.set_exception(error)
            else:
                _logger.exception("a batch failed")
                self._observer.failed()
                batch[0].result.set_exception(failure(error))
            return
        self._observer.ran(time.perf_counter() - started, sum(job.rows for job in batch))
        for job, result in zip(batch, results, strict=True):
            job.result.set_result(result)
