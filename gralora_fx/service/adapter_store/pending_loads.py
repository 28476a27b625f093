"""Adapter loads that requests wait for: one load for all requests of a name, no retry after a failure."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from gralora_fx.errors import GraloraError, shown
from gralora_fx.run.generate.request_errors import (
    AdapterLimitError,
    AdapterLoadError,
    AdaptersInUseError,
    DeadlineError,
    TooManyChangesError,
)
from gralora_fx.service.adapter_store.adapter_versions import AdapterVersion, RootFile
from gralora_fx.service.adapter_store.memory import AdapterMemory

_SHORT, _LONG = 5.0, 10**9  # seconds to remember a failure: not caused by the files; caused by them
_MOST_FAILURES = 10_000
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Load:
    """A load and the requests that wait for it, each with its own future."""

    name: str
    file: RootFile
    requests: list[Future[AdapterVersion]] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Number of requests that still wait."""
        return sum(not request.cancelled() for request in self.requests)


@dataclass(frozen=True)
class _Failure:
    """A failed load: remembered while the files are unchanged, until a time."""

    file: RootFile
    text: str
    until: float
    is_limit: bool


class PendingLoads:
    """Loads adapters for the requests that name them, of which `most` may wait.

    A load without room is retried when a request ends; it does not block the loads behind it. `when_loaded` is called
    with whether a load succeeded, and its seconds.
    """

    def __init__(self, memory: AdapterMemory, load: Callable[[str, RootFile], AdapterVersion]) -> None:
        """Start empty; `load` loads an adapter, serves it under its name and returns it held."""
        self.most = 0
        self.when_loaded: Callable[[bool, float], None] = lambda is_loaded, seconds: None
        self._memory, self._load, self._lock = memory, load, threading.Lock()
        self._loads: dict[str, _Load] = {}
        self._stalled: list[_Load] = []
        self._failures: dict[str, _Failure] = {}
        memory.when_freed = self._resume

    @property
    def requests(self) -> int:
        """Number of requests that wait for loads."""
        return sum(load.waiting for load in list(self._loads.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters being waited for."""
        return tuple(sorted(load.name for load in list(self._loads.values()) if load.waiting))

    async def wait(self, name: str, file: RootFile, end: float | None) -> AdapterVersion:
        """Wait for an adapter, joining a load in progress, until `end` (`time.monotonic`); return it held."""
        failure = self._failures.get(name)
        if failure is not None and failure.file == file and time.monotonic() < failure.until:
            raise AdapterLoadError(failure.text)
        request: Future[AdapterVersion] = Future()
        with self._lock:
            if self.requests >= self.most:
                raise TooManyChangesError(f"{self.most} requests wait for adapters to be loaded; ask again later")
            is_new = name not in self._loads
            load = self._loads.setdefault(name, _Load(name, file))
            load.requests.append(request)
        if is_new:
            self._memory.change_later(partial(self._run, load))
        try:
            async with asyncio.timeout(None if end is None else max(end - time.monotonic(), 0)):
                return await asyncio.wrap_future(request)
        except (TimeoutError, asyncio.CancelledError) as error:
            if not request.cancel() and request.exception() is None:  # it was resolved meanwhile
                self._memory.release(request.result().key)
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"the adapter {shown(name)} was not loaded in time; ask again") from error
            raise

    def refuse(self, name: str, file: RootFile, error: Exception) -> str:
        """Record and log a failed load; return the error's text."""
        is_known = isinstance(error, GraloraError)
        text = f"the adapter {shown(name)} cannot be loaded: {error if is_known else 'the log of the server says why'}"
        if is_known:
            _logger.warning(text)
        else:
            _logger.error("loading the adapter %s failed", name, exc_info=error)
        is_of_files = is_known and not isinstance(error.__cause__, OSError)
        if len(self._failures) >= _MOST_FAILURES:
            self._failures = {}
        until = time.monotonic() + (_LONG if is_of_files else _SHORT)
        self._failures[name] = _Failure(file, text, until, isinstance(error, AdapterLimitError))
        return text

    def forget_limits(self) -> None:
        """Allow retries of loads that failed for lack of room."""
        self._failures = {name: failure for name, failure in self._failures.items() if not failure.is_limit}

    def _resume(self) -> None:
        """Retry loads that had no room, after the load that may run now."""
        if self._loads:
            self._memory.change_later(self._run_stalled)

    def _run_stalled(self) -> None:
        stalled, self._stalled = self._stalled, []
        for load in stalled:
            self._run(load)

    def _run(self, load: _Load) -> None:
        """Load an adapter in the thread of changes and resolve every waiting request."""
        started, text = time.perf_counter(), ""
        with self._lock:
            if not load.waiting:
                del self._loads[load.name]
                return
        try:
            version = self._load(load.name, load.file)
        except AdaptersInUseError:
            self._stalled.append(load)
            return
        except Exception as error:  # noqa: BLE001  # it is told and logged
            text = self.refuse(load.name, load.file, error)
        with self._lock:
            del self._loads[load.name]
        requests = [request for request in load.requests if request.set_running_or_notify_cancel()]
        if not text:
            self._memory.hold(*[version.key] * len(requests))
            self._memory.release(version.key)  # the load's own hold
        for request in requests:
            if text:
                request.set_exception(AdapterLoadError(text))
            else:
                request.set_result(version)
        self.when_loaded(not text, time.perf_counter() - started)
