"""The models of a service by name: the base, and each adapter's version now, and older ones while requests run.

Adapters in memory are bounded: those that nobody pinned go when others need their room, the least recently used first.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.format.adapter_paths import check_name
from gralora_fx.run.model import OrtModel
from gralora_fx.run.sessions.adapter_file import AdapterSource
from gralora_fx.service.scheduling.adapter_versions import (
    AdapterLimits,
    AdapterLoader,
    AdapterNameError,
    AdapterVersion,
    UnknownAdapterError,
    UnknownModelError,
)
from gralora_fx.service.scheduling.change_thread import ChangeThread

_NAME_IN_KEY = 100  # characters of a name that a version's key begins with
_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class ServedModels:
    """The models that requests may name: the base, and adapters that are loaded, replaced and unloaded meanwhile.

    A version never changes. A new one is loaded, checked and tried beside the old one, and then the name stands for the
    new one. A request holds the version that it began with; one that has no name any more is freed when its last
    request ends. Changes run one after the other in a thread of their own.

    Attributes:
        base: The name of the model without an adapter.
        limits: How many adapters there is room for.
        changes: Runs changes.
        loader: Loads adapters that are not in memory; None if there are no others.
        when_evicted: Is called when one is freed for the room of another.
        when_idle: Is called when a request ended that held a version, or a change freed one.
    """

    def __init__(self, base: str, host: OrtModel, limits: AdapterLimits | None = None) -> None:
        """Take the adapters that the host has, each under its key as its name; they stay until they are unloaded."""
        self.base, self.limits, self._host = base, limits or AdapterLimits(), host
        self.loader: AdapterLoader | None = None
        self.when_evicted: Callable[[], None] = lambda: None
        self.when_idle: Callable[[], None] = lambda: None
        self._current = {key: AdapterVersion(key, key, self._size(key)) for key in host.adapters.available()}
        self._versions = {version.key: version for version in self._current.values()}
        self.limits.check(self._versions.values())
        self._lock = threading.Lock()
        self._count, self._clock, self._is_closed = itertools.count(2), itertools.count(1), False
        self.changes = ChangeThread()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are loaded now."""
        return tuple(sorted(self._current))

    @property
    def available(self) -> tuple[str, ...]:
        """The adapters that requests may name."""
        return tuple(sorted({*self._current, *([] if self.loader is None else self.loader.names())} - {self.base}))

    @property
    def memory(self) -> int:
        """Bytes of all versions in memory."""
        return sum(version.size for version in self._versions.values())

    @property
    def running(self) -> tuple[str, ...]:
        """The adapters that requests run with, or are about to."""
        return tuple(sorted({version.name for version in self._versions.values() if version.holds}))

    def __len__(self) -> int:
        """How many versions are in memory."""
        return len(self._versions)

    def knows(self, model: str) -> bool:
        """Whether requests may name a model."""
        is_there = model == self.base or model in self._current
        return is_there or (self.loader is not None and self.loader.knows(model))

    def check(self, model: str) -> None:
        """Check that requests may name a model."""
        if not self.knows(model):
            raise self.unknown(model)

    def unknown(self, model: str) -> UnknownModelError:
        """The error of a request that names a model which is not there."""
        others = "" if self.loader is None else ", and those of the adapter root, which /v1/models lists"
        names = [self.base, *(name for name in self.adapters if name != model)]  # it may be one whose files are gone
        return UnknownModelError(f"no model {shown(model)}; there is {listed(names)}{others}")

    @contextmanager
    def held(self, model: str) -> Iterator[str | None]:
        """Hold the adapter that a model's name means, and give its key; None for the base.

        A queue holds it for the requests that it takes, so this is to last until they are queued.
        """
        if model == self.base:
            yield None
            return
        version = self.hold_current(model)
        if version is None:
            raise self.unknown(model)
        try:
            yield version.key
        finally:
            self.release(version.key)

    @asynccontextmanager
    async def ready(self, model: str, seconds: float | None = None) -> AsyncIterator[str | None]:
        """Hold the adapter that a model's name means, as `held` does, once it is loaded.

        Args:
            model: The model's name.
            seconds: How long that may take; None for no limit.
        """
        if self.loader is None or model == self.base:
            with self.held(model) as key:
                yield key
            return
        taken = await self.loader.take(model, seconds)
        try:
            yield taken
        finally:
            self.release(taken)

    def hold_current(self, name: str, count: int = 1) -> AdapterVersion | None:
        """Hold the version that an adapter's name stands for, until as many releases; None if there is none."""
        with self._lock:
            version = self._current.get(name)
            if version is not None:
                version.holds += count
                version.used = next(self._clock)
            return version

    def hold(self, *keys: str | None) -> None:
        """Keep versions, all or none, until as many releases; None, the base, always stays."""
        with self._lock:
            versions = [self._version(key) for key in keys if key is not None]
            for version in versions:
                version.holds += 1

    def release(self, key: str | None) -> None:
        """End a hold."""
        if key is None:
            return
        with self._lock:
            version = self._versions[key]
            version.holds -= 1
            self._free_unused(version)
            if not version.holds:
                self.when_idle()

    def change(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Run some work that changes adapters; as of `ChangeThread.submit`."""
        return self.changes.submit(work)

    def check_new(self, name: str, *, replace: bool) -> None:
        """Check that a name may be given to an adapter."""
        if name == self.base:
            raise AdapterNameError(f"{shown(name)} is the name of the base; take another")
        check_name(name, AdapterNameError)
        if name in self._current and not replace:
            raise AdapterNameError(
                f"an adapter {name!r} is loaded already; give load_inplace to replace it, or unload it"
            )

    def prepare(
        self,
        name: str,
        path: AdapterSource,
        try_adapter: Callable[[str], None],
        *,
        replace: bool,
        state: Hashable = None,
        pin: bool = True,
        defer_trial: bool = False,
    ) -> AdapterVersion:
        """Load a version that its name does not stand for until `commit`; within `change`."""
        self.check_new(name, replace=replace)
        self._make_room(name, 0)
        key = self._new_key(name)
        self._host.load_adapter(key, path)
        try:
            size = self._size(key)
            self._make_room(name, size)
            if not defer_trial:
                try_adapter(key)
        except Exception:
            self._host.unload_adapter(key)
            raise
        version = AdapterVersion(name, key, size, state, pin, holds=1, is_current=False)
        version.trial = try_adapter if defer_trial else None
        with self._lock:
            self._versions = {**self._versions, key: version}
        return version

    def commit(self, version: AdapterVersion) -> None:
        """Let its name stand for a version that was prepared; within `change`."""
        with self._lock:
            old = self._current.get(version.name)
            version.is_current, version.used = True, next(self._clock)
            self._current = {**self._current, version.name: version}
            if old is not None:
                self._retire(old)
        self.release(version.key)

    def check_outputs(self, key: str | None, outputs: NDArray[Any]) -> None:
        """Check that the model runs with a version, by outputs of its first request."""
        version = None if key is None else self._versions.get(key)
        if version is None or version.trial is None:
            return
        if not np.isfinite(outputs).all():
            try:
                version.trial(version.key)
            except ServingError as error:
                assert self.loader is not None  # which alone defers trials
                raise self.loader.refuse(version, error) from error
        version.trial = None

    def unload(self, name: str) -> None:
        """Take an adapter's name away; requests that run with it end undisturbed."""
        with self._lock:
            version = self._current.get(name)
            if version is None:
                loaded = listed(self.adapters) or "none"
                raise UnknownAdapterError(f"no adapter {shown(name)} is loaded; loaded is {loaded}")
            self._current = {other: found for other, found in self._current.items() if other != name}
            self._retire(version)

    def close(self) -> None:
        """End the thread of changes once those that wait are done."""
        with self._lock:
            self._is_closed = True
        self.changes.close()

    def _size(self, key: str) -> int:
        return int(self._host.adapters[key].size)

    def _make_room(self, name: str, size: int) -> None:
        """Free versions until there is room for one more, or say why there is none (see `AdapterLimits.victim`)."""
        while True:
            with self._lock:
                victim = self.limits.victim(self._versions.values(), self._current.get(name), name, size)
                if victim is None:
                    return
                victim.is_current = False
                self._current = {other: v for other, v in self._current.items() if v is not victim}
                self._versions = {key: v for key, v in self._versions.items() if v is not victim}
            self._free(victim)
            self.when_evicted()

    def _version(self, key: str) -> AdapterVersion:
        if key not in self._versions:
            raise UnknownModelError(f"the adapter {shown(key)} was unloaded; ask for another")
        return self._versions[key]

    def _new_key(self, name: str) -> str:
        known: Mapping[str, Any] = dict.fromkeys(self._host.adapters.available())
        return next(key for n in self._count if (key := f"{name[:_NAME_IN_KEY]}.{n}") not in known)

    def _retire(self, version: AdapterVersion) -> None:
        version.is_current = False
        self._free_unused(version)

    def _free_unused(self, version: AdapterVersion) -> None:
        """Have a version freed that no name stands for and no request holds; called with the lock held."""
        if version.is_current or version.holds or self._is_closed:
            return
        self._versions = {key: found for key, found in self._versions.items() if found is not version}
        self.changes.run_later(partial(self._free, version))

    def _free(self, version: AdapterVersion) -> None:
        try:
            self._host.unload_adapter(version.key)
        except Exception:
            _logger.exception("freeing a version of an adapter failed")
        self.when_idle()
