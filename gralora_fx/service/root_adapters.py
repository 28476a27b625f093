"""The adapters of a root as requests name and change them: found when they are asked for, loaded, and unloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Protocol

from gralora_fx.errors import listed, shown
from gralora_fx.run.sessions.adapter_file import AdapterSource
from gralora_fx.service.adapter_loads import load_adapter
from gralora_fx.service.adapter_root import AdapterRoot
from gralora_fx.service.engines import Engine
from gralora_fx.service.scheduling.adapter_versions import AdapterVersion, UnknownAdapterError


class AdapterChanges(Protocol):
    """Changes of a service's adapters that requests ask for."""

    async def load(self, name: str, path: str, *, may_replace: bool, pin: bool) -> None:
        """Load the adapter at a path of the root under a name; errors as of `RootAdapters.prepare`."""

    async def unload(self, name: str) -> None:
        """Take an adapter's name away; errors as of `RootAdapters.withdraw`."""


class RootAdapters:
    """The adapters of a root: those right below it by their own names, others by the names that requests gave them."""

    def __init__(self, engine: Engine, root: AdapterRoot, onnx_dir: Path) -> None:
        """Begin with those right below the root."""
        self._engine, self._root, self._onnx_dir = engine, root, onnx_dir
        self._paths: dict[str, str] = {}  # of those that a request named, and did not pin
        self._withdrawn: set[str] = set()  # until a request names them again

    def names(self) -> list[str]:
        """The adapters that there are, whether they can be loaded or not."""
        return sorted({*self._root.names(), *self._paths} - self._withdrawn)

    def state_of(self, name: str) -> Hashable:
        """What an adapter's files are like, which differs once they were changed; None if there is no such adapter."""
        path = self._paths.get(name) or self._root.find(name)
        if path is None or name in self._withdrawn:
            return None
        state = self._root.state_of(path)
        return None if all(facts is None for facts in state) else (path, state)

    def load(self, name: str, state: Hashable) -> None:
        """Load an adapter that a request names; within a change."""
        assert isinstance(state, tuple)
        source = partial(self._source, state[0], name)
        version = load_adapter(self._engine, name, source, may_replace=True, state=state, pin=False, defer_trial=True)
        self._engine.models.commit(version)

    def prepare(self, name: str, path: str, *, may_replace: bool, pin: bool) -> AdapterVersion:
        """Load an adapter that a request gives a name; within a change, and `commit` it."""
        state = None if pin else (path, self._root.state_of(path))
        return load_adapter(
            self._engine, name, partial(self._source, path, name), may_replace=may_replace, state=state, pin=pin
        )

    def commit(self, version: AdapterVersion, path: str) -> None:
        """Let its name stand for a version that was prepared; within a change."""
        self._paths.pop(version.name, None)
        if not version.is_pinned:
            self._paths[version.name] = path
        self._withdrawn.discard(version.name)
        self._engine.models.commit(version)

    def point(self, name: str, path: str) -> None:
        """Let a name stand for what is at a path, which is loaded when a request names it; within a change."""
        if name in self._engine.models.adapters:
            self._engine.models.unload(name)
        self._paths[name] = path
        self._withdrawn.discard(name)

    def check_there(self, name: str) -> None:
        """Check that requests may name an adapter."""
        loaded, is_base = self._engine.models.adapters, name == self._engine.models.base
        if is_base or (name not in loaded and self.state_of(name) is None):
            raise UnknownAdapterError(f"no adapter {shown(name)} is loaded; loaded is {listed(loaded) or 'none'}")

    def withdraw(self, name: str) -> None:
        """Take a name away, of an adapter not in memory too, until a request gives it again; within a change."""
        models = self._engine.models
        self.check_there(name)
        if name in models.adapters:
            models.unload(name)
        self._paths.pop(name, None)
        if self._root.find(name) is not None:
            self._withdrawn.add(name)

    def _source(self, path: str, name: str) -> AdapterSource:
        return self._root.source(path, name, self._onnx_dir, self._engine.manifest)


class OwnChanges:
    """Changes of the adapters of this process."""

    def __init__(self, engine: Engine, adapters: RootAdapters, when_changed: Callable[[], None]) -> None:
        """Take the adapters."""
        self._models, self._adapters, self._when_changed = engine.models, adapters, when_changed

    async def load(self, name: str, path: str, *, may_replace: bool, pin: bool) -> None:
        """Load the adapter at a path of the root under a name."""

        def work() -> None:
            self._adapters.commit(self._adapters.prepare(name, path, may_replace=may_replace, pin=pin), path)

        await self._changed(work)

    async def unload(self, name: str) -> None:
        """Take an adapter's name away."""
        await self._changed(lambda: self._adapters.withdraw(name))

    async def _changed(self, work: Callable[[], None]) -> None:
        """Wait for a change of adapters, which goes on if the client goes away."""
        await asyncio.shield(asyncio.wrap_future(self._models.change(work)))
        self._when_changed()
