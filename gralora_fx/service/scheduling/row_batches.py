"""Dynamic batching of single runs: jobs that wait while a batch runs form the next one."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.request_errors import RunError
from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.scheduling.queue import JobQueue, Observer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RowJob:
    """Rows to run."""

    key: Hashable  # jobs of equal keys can share a batch
    rows: int  # number of rows
    payload: Any  # argument for the function that runs batches
    length: int = 0  # length of its rows, if rows of other lengths cost padding
    adapter: str | None = None  # the adapter's key; None for the base
    # the job's result; cancelling it before the job runs cancels the job
    result: Future[Any] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def is_cancelled(self) -> bool:
        """Return whether its caller has gone."""
        return self.result.cancelled()


class RowBatches(JobQueue[RowJob]):
    """Takes rows from any thread, and runs them in batches in its own thread, earliest first.

    A batch is the job that has waited longest and those nearest to it in length.
    """

    unit = "rows"
    excess = "rows are given", "give fewer"

    def __init__(
        self,
        run: Callable[[Sequence[RowJob]], Sequence[Any]],
        observer: Observer,
        *,
        max_batch: int,
        max_queue: int,
        models: AdapterStore | None = None,
    ) -> None:
        """Create an empty queue; `start` starts its thread."""
        super().__init__("gralora-fx rows", observer, room=max_batch + max_queue, models=models)
        self._run, self._max_batch = run, max_batch
        self._running = 0

    @property
    def running(self) -> int:
        """Number of rows that run."""
        return self._running

    def _turn(self) -> None:
        with self._condition:
            batch = self._take()
            self._running = sum(job.rows for job in batch)
        for job in batch:
            self._observer.waited(time.perf_counter() - job.submitted)
        if batch:
            self._run_batch(batch)
        self._running = 0

    def _take(self) -> list[RowJob]:
        """Return the first waiting job, and those of its key nearest in length that fit.

        Since the first job always runs, a job waits for at most as many batches as there were jobs before it.
        """
        batch: list[RowJob] = []
        while self._waiting and not batch:
            first = self._waiting.popleft()
            batch = self._started([first])
        if not batch:
            return batch
        rows, mates = first.rows, dict[RowJob, None]()  # ordered, with fast lookup in a long queue
        same = (job for job in self._waiting if job.key == first.key)
        for job in sorted(same, key=lambda job: abs(job.length - first.length)):
            if rows + job.rows <= self._max_batch:
                mates[job] = None
                rows += job.rows * (not job.is_cancelled)
        self._waiting = deque(job for job in self._waiting if job not in mates)
        return [*batch, *self._started(mates)]

    def _started(self, jobs: Iterable[RowJob]) -> list[RowJob]:
        """Mark jobs as running; return those not cancelled while they waited."""
        started = []
        for job in jobs:
            if job.result.set_running_or_notify_cancel():
                started.append(job)
            else:
                self._leave(job)
        return started

    def _run_batch(self, batch: Sequence[RowJob]) -> None:
        started = time.perf_counter()
        try:
            results = self._run(batch)
        except Exception as error:
            if len(batch) > 1:  # one may be invalid and the others fine
                for job in batch:
                    self._run_batch([job])
                return
            self._leave(batch[0])
            if isinstance(error, ServingError):
                batch[0].result.set_exception(error)
            else:
                _logger.exception("a batch failed")
                self._observer.failed()
                batch[0].result.set_exception(RunError.of(error))
            return
        self._observer.ran(time.perf_counter() - started, sum(job.rows for job in batch))
        for job, result in zip(batch, results, strict=True):
            self._leave(job)  # before its caller resumes, which may ask for the adapters in memory
            job.result.set_result(result)
