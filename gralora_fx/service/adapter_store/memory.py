"""Adapters in memory: the version served under each name, and older ones that requests still run with."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from gralora_fx.errors import shown
from gralora_fx.run.generate.request_errors import TooManyChangesError, UnknownModelError
from gralora_fx.run.model import OrtModel
from gralora_fx.run.sessions.adapter_file import AdapterSource
from gralora_fx.service.adapter_store.adapter_versions import AdapterLimits, AdapterVersion, RootFile

_MOST_CHANGES = 16  # maximum number of waiting changes
_NAME_IN_KEY = 100  # characters of the name that begin a version's key
_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class AdapterMemory:
    """Holds versions within limits.

    A version is immutable: a new one is loaded beside the old one, then the name is switched to it. A request holds
    the version that it began with. A version that no name refers to is freed when its last hold ends; other unpinned
    versions are evicted least recently used first when a new one needs room. Changes run one at a time in their own
    thread.

    Attributes:
        limits: Limits on number and memory.
        when_evicted: Called when a version is evicted to make room.
        when_freed: Called when there may be more room: a hold ended, or a version was freed.
    """

    def __init__(self, host: OrtModel, limits: AdapterLimits | None = None) -> None:
        """Pin the adapters that the host already has; raise an `AdapterLimitError` if there are too many."""
        self.limits, self._host = limits or AdapterLimits(), host
        self.when_evicted: Callable[[], None] = lambda: None
        self.when_freed: Callable[[], None] = lambda: None
        self._serving = {key: AdapterVersion(key, key, self._size(key)) for key in host.adapters.available()}
        self._versions = {version.key: version for version in self._serving.values()}
        self.limits.check(self._versions.values())
        self._lock, self._is_closed = threading.Lock(), False
        self._numbers, self._clock = itertools.count(2), itertools.count(1)
        self._room_for_changes = threading.BoundedSemaphore(_MOST_CHANGES)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gralora-fx adapters")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(sorted(self._serving))

    @property
    def memory(self) -> int:
        """Bytes of all versions in memory."""
        return sum(version.size for version in self._versions.values())

    def __len__(self) -> int:
        """Return the number of versions in memory."""
        return len(self._versions)

    def hold(self, *keys: str | None) -> None:
        """Hold versions until each is released (None, the base, is ignored), or raise an `UnknownModelError`."""
        with self._lock:
            named = [key for key in keys if key is not None]
            for key in named:
                if key not in self._versions:
                    raise UnknownModelError(f"the adapter {shown(key)} was unloaded; ask for another")
            for key in named:
                self._versions[key].holds += 1

    def hold_named(self, name: str) -> AdapterVersion | None:
        """Hold the version served under a name; return None if there is none."""
        with self._lock:
            version = self._serving.get(name)
            if version is not None:
                version.holds += 1
                version.used = next(self._clock)
            return version

    def release(self, key: str | None) -> None:
        """End a hold."""
        if key is None:
            return
        with self._lock:
            version = self._versions[key]
            version.holds -= 1
            self._free_unused(version)
            if not version.holds:
                self.when_freed()

    def add(
        self, name: str, source: AdapterSource, try_adapter: Callable[[str], None] | None, file: RootFile | None
    ) -> AdapterVersion:
        """Load a version that no name refers to yet and return it held; call within a change.

        `try_adapter` tries it; if None, its first request does. On a `ServingError` (unusable, no room) nothing else
        changed, except that other versions may have been evicted.
        """
        self._make_room(name, 0)
        key = self._new_key(name)
        self._host.load_adapter(key, source)
        try:
            size = self._size(key)
            self._make_room(name, size)
            if try_adapter is not None:
                try_adapter(key)
        except Exception:
            self._host.unload_adapter(key)
            raise
        version = AdapterVersion(name, key, size, file, holds=1, is_tried=try_adapter is not None)
        with self._lock:
            self._versions = {**self._versions, key: version}
        return version

    def give_name(self, version: AdapterVersion) -> None:
        """Serve a version under its name."""
        with self._lock:
            old = self._serving.get(version.name)
            version.used = next(self._clock)
            self._serving = {**self._serving, version.name: version}
            if old is not None:
                self._free_unused(old)

    def take_name(self, version: AdapterVersion) -> None:
        """Stop serving a version under its name, unless the name refers to another version by now."""
        with self._lock:
            if self._serving.get(version.name) is version:
                self._serving = {name: each for name, each in self._serving.items() if each is not version}
                self._free_unused(version)

    def change(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Run a change of adapters after those queued; raise a `TooManyChangesError` if too many wait."""
        if not self._room_for_changes.acquire(blocking=False):
            raise TooManyChangesError(f"{_MOST_CHANGES} changes of adapters wait; ask again later")

        def begun() -> _Result:
            self._room_for_changes.release()
            return work()

        return self._thread.submit(begun)

    def change_later(self, work: Callable[[], None]) -> None:
        """Queue a change made by the service itself; do nothing once the thread has ended."""
        with suppress(RuntimeError):
            self._thread.submit(work)

    def close(self) -> None:
        """End the thread after the queued changes."""
        with self._lock:
            self._is_closed = True
        self._thread.shutdown()

    def _size(self, key: str) -> int:
        return int(self._host.adapters[key].size)

    def _new_key(self, name: str) -> str:
        known = set(self._host.adapters.available())
        return next(key for n in self._numbers if (key := f"{name[:_NAME_IN_KEY]}.{n}") not in known)

    def _make_room(self, name: str, size: int) -> None:
        """Evict versions until one more fits, or raise (see `AdapterLimits.victim`)."""
        while True:
            with self._lock:
                victim = self.limits.victim(self._versions.values(), self._serving, name, size)
                if victim is None:
                    return
                self._serving = {other: version for other, version in self._serving.items() if version is not victim}
                self._versions = {key: version for key, version in self._versions.items() if version is not victim}
            self._free(victim)
            self.when_evicted()

    def _free_unused(self, version: AdapterVersion) -> None:
        """Queue freeing a version that no name refers to and no request holds; the caller holds the lock."""
        if self._serving.get(version.name) is version or version.holds or self._is_closed:
            return
        self._versions = {key: each for key, each in self._versions.items() if each is not version}
        self.change_later(partial(self._free, version))

    def _free(self, version: AdapterVersion) -> None:
        try:
            self._host.unload_adapter(version.key)
        except Exception:
            _logger.exception("freeing a version of an adapter failed")
        self.when_freed()
