"""Adapters that are loaded when a request first names them: once for all that wait, and not again after a failure."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from gralora_fx.errors import GraloraError, ServingError, shown
from gralora_fx.service.scheduling.adapter_versions import (
    AdapterLimitError,
    AdapterLoadError,
    AdaptersInUseError,
    AdapterVersion,
    TooManyChangesError,
)
from gralora_fx.service.scheduling.queue import DeadlineError
from gralora_fx.service.scheduling.served_models import ServedModels

_SHORT, _LONG = 5.0, 10**9  # seconds that a failure is remembered which is not of the files, and one which is
_MOST_FAILURES = 10_000
_logger = logging.getLogger(__name__)


class AdapterSource(Protocol):
    """Where adapters are that are not in memory."""

    def names(self) -> list[str]:
        """The adapters that there are."""

    def state_of(self, name: str) -> Hashable:
        """What an adapter's files are like, which differs once they were changed; None if there is no such adapter."""

    def load(self, name: str, state: Hashable) -> None:
        """Load an adapter, so that its name stands for it; called within `ServedModels.change`."""


@dataclass
class _Loading:
    """A load that requests wait for.

    Attributes:
        name: The adapter's name.
        state: What its files were like when it was asked for.
        result: The version, which is held once for each that waits.
        waiting: How many requests wait.
    """

    name: str
    state: Hashable
    result: Future[AdapterVersion] = field(default_factory=Future)
    waiting: int = 0


@dataclass(frozen=True)
class _Failure:
    """Why an adapter cannot be loaded, while its files are as they were and for a time."""

    state: Hashable
    text: str
    until: float
    is_limit: bool


class OnDemandAdapters:
    """Loads adapters of a source for the requests that name them.

    Files that were changed are a new version, which requests wait for; one that was removed is gone. While the new
    files cannot be loaded, the version in memory goes on.
    """

    def __init__(self, models: ServedModels, source: AdapterSource, *, most_waiting: int) -> None:
        """Begin without loads."""
        self._models, self._source, self._most = models, source, most_waiting
        self._lock = threading.Lock()
        self._loading: dict[str, _Loading] = {}
        self._stalled: list[_Loading] = []  # until a request ends
        self._resumed = 0  # how often one has
        self._failures: dict[str, _Failure] = {}
        self.when_loaded: Callable[[bool, float], None] = lambda is_loaded, seconds: None
        models.loader, models.when_idle = self, self._resume

    def names(self) -> list[str]:
        """The adapters that there are."""
        return self._source.names()

    def knows(self, name: str) -> bool:
        """Whether there is an adapter of a name."""
        return self._source.state_of(name) is not None

    @property
    def requests(self) -> int:
        """How many requests wait for loads."""
        return sum(loading.waiting for loading in list(self._loading.values()))

    @property
    def waiting(self) -> tuple[str, ...]:
        """The adapters that they wait for."""
        return tuple(sorted(loading.name for loading in list(self._loading.values()) if loading.waiting))

    def forget_failures(self) -> None:
        """Let loads be tried again that failed for want of room."""
        self._failures = {name: failure for name, failure in self._failures.items() if not failure.is_limit}

    async def take(self, name: str, seconds: float | None) -> str:
        """The key of an adapter's version, which is held then; it is loaded if it is not there.

        Args:
            name: The adapter's name.
            seconds: How long that may take; None for no limit.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            state = self._source.state_of(name)
            version = self._models.hold_current(name)
            if version is not None and version.state in (None, state):
                return version.key
            if version is not None:
                self._models.release(version.key)  # it would keep the room of the next one
            if state is None:
                if version is not None:
                    self._remove(version)
                raise self._models.unknown(name)
            try:
                loaded = await self._load(name, state, end)
            except AdapterLoadError:
                older = self._models.hold_current(name)
                if older is None:
                    raise
                return older.key  # the files are damaged, and this version is not
            if loaded.state in (None, state):
                return loaded.key
            self._models.release(loaded.key)  # of files as they were before this request

    async def _load(self, name: str, state: Hashable, end: float | None) -> AdapterVersion:
        """A version, held, that was loaded for this request and others."""
        failure = self._failures.get(name)
        if failure is not None and failure.state == state and time.monotonic() < failure.until:
            raise AdapterLoadError(failure.text)
        with self._lock:
            if self.requests >= self._most:
                raise TooManyChangesError(f"{self._most} requests wait for adapters to be loaded; ask again later")
            loading = self._loading.get(name)
            is_new = loading is None
            if loading is None:
                loading = self._loading[name] = _Loading(name, state)
            loading.waiting += 1
        if is_new:
            self._begin(loading)
        try:
            async with asyncio.timeout(None if end is None else max(end - time.monotonic(), 0)):
                return await asyncio.shield(asyncio.wrap_future(loading.result))
        except (TimeoutError, asyncio.CancelledError) as error:
            self._leave(loading)
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"the adapter {shown(name)} was not loaded in time; ask again") from error
            raise

    def _leave(self, loading: _Loading) -> None:
        """Give up waiting; a hold that was already handed over ends."""
        with self._lock:
            loading.waiting -= 1
            version = loading.result.result() if _succeeded(loading.result) else None
        if version is not None:
            self._models.release(version.key)

    def _begin(self, loading: _Loading) -> None:
        self._models.changes.run_later(lambda: self._run(loading))

    def _resume(self) -> None:
        """Try loads again that had no room."""
        self._resumed += 1
        stalled, self._stalled = self._stalled, []
        for loading in stalled:
            self._begin(loading)

    def _run(self, loading: _Loading) -> None:
        """Load an adapter, in the thread of changes."""
        started, resumed = time.perf_counter(), self._resumed
        with self._lock:
            if not loading.waiting:
                del self._loading[loading.name]
                return
        try:
            self._source.load(loading.name, loading.state)
        except AdaptersInUseError:
            self._stalled.append(loading)
            if self._resumed != resumed:  # meanwhile
                self._resume()
            return
        except GraloraError as error:
            self._fail(loading, error)
        except Exception as error:
            _logger.exception("loading the adapter %s failed", loading.name)
            self._fail(loading, error)
        else:
            self._finish(loading, lambda: self._hand_over(loading))
        self.when_loaded(_succeeded(loading.result), time.perf_counter() - started)

    def _hand_over(self, loading: _Loading) -> None:
        version = self._models.hold_current(loading.name, loading.waiting)
        assert version is not None  # only this thread unloads
        loading.result.set_result(version)

    def _finish(self, loading: _Loading, tell: Callable[[], object]) -> None:
        with self._lock:
            del self._loading[loading.name]
            tell()

    def refuse(self, version: AdapterVersion, error: ServingError) -> AdapterLoadError:
        """Take note that the model does not run with a version, and say so; it has no name from then on."""
        self._remove(version)
        return self._remember(version.name, version.state, error)

    def _fail(self, loading: _Loading, error: Exception) -> None:
        problem = self._remember(loading.name, loading.state, error)
        self._finish(loading, lambda: loading.result.set_exception(problem))

    def _remember(self, name: str, state: Hashable, error: Exception) -> AdapterLoadError:
        is_known = isinstance(error, GraloraError)
        text = f"the adapter {shown(name)} cannot be loaded: {error if is_known else 'the log of the server says why'}"
        if is_known:
            _logger.warning(text)
        is_of_files = is_known and not isinstance(error.__cause__, OSError)
        if len(self._failures) >= _MOST_FAILURES:
            self._failures = {}
        until = time.monotonic() + (_LONG if is_of_files else _SHORT)
        self._failures[name] = _Failure(state, text, until, isinstance(error, AdapterLimitError))
        return AdapterLoadError(text)

    def _remove(self, version: AdapterVersion) -> None:
        """Let a version go, unless its name stands for another one by then."""

        def remove() -> None:
            if version.is_current:
                self._models.unload(version.name)

        with suppress(TooManyChangesError):  # the next request tries again
            self._models.change(remove)


def _succeeded(result: Future[AdapterVersion]) -> bool:
    return result.done() and not result.cancelled() and result.exception() is None
