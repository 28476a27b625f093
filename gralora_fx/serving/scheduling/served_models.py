"""The models of a service by name: the base, and each adapter's version now, and older ones while requests run."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.runtime.adapter_paths import check_name
from gralora_fx.serving.model import OrtModel

_NAME_IN_KEY = 100  # characters of a name that a version's key begins with
_MOST_CHANGES = 16  # that wait
_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class UnknownModelError(ServingError):
    """A request names a model that is not served."""


class UnknownAdapterError(ServingError):
    """A request names an adapter that is not there."""


class TooManyChangesError(ServingError):
    """There is no room for more loads now."""


@dataclass
class _Version:
    """An adapter as it was loaded once.

    Attributes:
        key: What the host calls it.
        dispose: Is called when it was freed.
        holds: How many requests run with it, or are about to.
        is_current: Whether its name stands for it.
    """

    key: str
    dispose: Callable[[], None] = lambda: None
    holds: int = 0
    is_current: bool = True


class ServedModels:
    """The models that requests may name: the base, and adapters that are loaded, replaced and unloaded meanwhile.

    A version never changes. A new one is loaded, checked and tried beside the old one, and then the name stands for the
    new one. A request holds the version that it began with; one that has no name any more is freed when its last
    request ends. Changes run one after the other in a thread of their own.

    Attributes:
        base: The name of the model without an adapter.
    """

    def __init__(self, base: str, host: OrtModel) -> None:
        """Take the adapters that the host has, each under its key as its name.

        Args:
            base: The name of the model without an adapter.
            host: Holds the adapters; nobody else unloads any.
        """
        self.base, self._host = base, host
        self._current = {key: _Version(key) for key in host.adapters.available()}
        self._versions = {version.key: version for version in self._current.values()}
        self._lock = threading.Lock()
        self._count, self._waiting, self._is_closed = itertools.count(2), 0, False
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="gralora-fx adapters")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are loaded now."""
        return tuple(sorted(self._current))

    def __len__(self) -> int:
        """How many versions are in memory."""
        return len(self._versions)

    def check(self, model: str) -> None:
        """Check that a model is served now.

        Raises:
            UnknownModelError: There is no such model.
        """
        with self.held(model):
            pass

    @contextmanager
    def held(self, model: str) -> Iterator[str | None]:
        """Hold the adapter that a model's name means, and give its key; None for the base.

        A queue holds it for the requests that it takes, so this is to last until they are queued.

        Raises:
            UnknownModelError: There is no such model.
        """
        if model == self.base:
            yield None
            return
        with self._lock:
            version = self._current.get(model)
            if version is None:
                raise UnknownModelError(f"no model {shown(model)}; there is {listed((self.base, *self.adapters))}")
            version.holds += 1
        try:
            yield version.key
        finally:
            self.release(version.key)

    def hold(self, *keys: str | None) -> None:
        """Keep versions, all or none, until as many releases; None, the base, always stays.

        Raises:
            UnknownAdapterError: One is freed already.
        """
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

    def change(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Run some work that changes adapters, after the changes that wait already.

        Raises:
            TooManyChangesError: Too many wait.
        """
        with self._lock:
            if self._waiting >= _MOST_CHANGES:
                raise TooManyChangesError(f"{self._waiting} changes of adapters wait; ask again later")
            self._waiting += 1

        def counted() -> _Result:
            with self._lock:
                self._waiting -= 1
            return work()

        return self._changes.submit(counted)

    def check_new(self, name: str, *, replace: bool) -> None:
        """Check that a name may be given to an adapter.

        Raises:
            ServingError: It is not a name, or is taken and not to be replaced.
        """
        check_name(name, ServingError)
        if name in self._current and not replace:
            raise ServingError(f"an adapter {name!r} is loaded already; give load_inplace to replace it, or unload it")

    def load(
        self, name: str, path: Path, try_adapter: Callable[[str], None], *, replace: bool, dispose: Callable[[], None]
    ) -> None:
        """Load a version, and let its name stand for it; within `change`.

        Args:
            name: The adapter's name.
            path: Its `.onnx_adapter` file, which stays as it is until it is disposed of.
            try_adapter: Runs the model with the adapter of a key, and raises a `ServingError` if that fails.
            replace: Whether the name may stand for another version before.
            dispose: Is called when the version was freed.

        Raises:
            ServingError: The name is taken or is not one, the file may not be used, or the model does not run with it;
                nothing changes then.
        """
        self.check_new(name, replace=replace)
        key = self._new_key(name)
        self._host.load_adapter(key, path)
        try:
            try_adapter(key)
        except Exception:
            self._host.unload_adapter(key)
            raise
        version = _Version(key, dispose)
        with self._lock:
            old = self._current.get(name)
            self._versions = {**self._versions, key: version}
            self._current = {**self._current, name: version}
            if old is not None:
                self._retire(old)

    def unload(self, name: str) -> None:
        """Take an adapter's name away; requests that run with it end undisturbed.

        Raises:
            UnknownAdapterError: There is no adapter of the name.
        """
        with self._lock:
            version = self._current.get(name)
            if version is None:
                loaded = listed(self.adapters) or "none"
                raise UnknownAdapterError(f"no adapter {shown(name)} is loaded; loaded is {loaded}")
            self._current = {other: found for other, found in self._current.items() if other != name}
            self._retire(version)

    def close(self) -> None:
        """End the thread of changes once those that wait are done, and dispose of all versions."""
        with self._lock:
            self._is_closed = True
        self._changes.shutdown()
        for version in self._versions.values():
            version.dispose()

    def _version(self, key: str) -> _Version:
        if key not in self._versions:
            raise UnknownAdapterError(f"the adapter {shown(key)} was unloaded; ask for another")
        return self._versions[key]

    def _new_key(self, name: str) -> str:
        known: Mapping[str, Any] = dict.fromkeys(self._host.adapters.available())
        return next(key for n in self._count if (key := f"{name[:_NAME_IN_KEY]}.{n}") not in known)

    def _retire(self, version: _Version) -> None:
        version.is_current = False
        self._free_unused(version)

    def _free_unused(self, version: _Version) -> None:
        """Have a version freed that no name stands for and no request holds; called with the lock held."""
        if version.is_current or version.holds or self._is_closed:
            return
        self._versions = {key: found for key, found in self._versions.items() if found is not version}
        self._changes.submit(self._free, version)

    def _free(self, version: _Version) -> None:
        try:
            self._host.unload_adapter(version.key)
            version.dispose()
        except Exception:
            _logger.exception("freeing a version of an adapter failed")
