"""Adapters that requests load and unload in all replicas, or in none; a replica that starts gets what the others have.

What is loaded is a record in a folder that the processes share, each adapter as a file beside it. A change is tried by
every replica, then written to the record, and then each does what the record says; so does one that starts, and one
that finds the record changed when a request comes.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.serve.exceptions import RayServeException
from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import GraloraError, first_line
from gralora_fx.service.adapter_loads import load_adapter
from gralora_fx.service.adapter_root import AdapterRoot
from gralora_fx.service.engines import Engine
from gralora_fx.service.root_adapters import RootAdapters
from gralora_fx.service.scheduling.adapter_versions import AdapterVersion
from gralora_fx.service.scheduling.queue import StoppedError

_RECORD = "adapters.json"


class UnevenReplicasError(StoppedError):
    """A replica ended while an adapter was loaded."""


@dataclass(frozen=True)
class SharedAdapters:
    """What requests have loaded and unloaded.

    Attributes:
        number: How many changes there were.
        loaded: The file of each adapter by its name, below the folder.
        named: Of each that is not pinned its path in the root.
        unloaded: Names that were taken away.
    """

    number: int = 0
    loaded: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    unloaded: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> SharedAdapters:
        """What the record of a folder says; nothing if there is none."""
        try:
            fields = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        return cls(**{**fields, "unloaded": tuple(fields["unloaded"])})

    def without(self, name: str) -> SharedAdapters:
        """What is left if a name has not been given or taken away."""
        loaded, named = ({n: file for n, file in files.items() if n != name} for files in (self.loaded, self.named))
        return SharedAdapters(self.number, loaded, named, tuple(other for other in self.unloaded if other != name))

    def write(self, folder: Path) -> None:
        """Write the record, as a whole."""
        new = folder / f"{_RECORD}.new"
        new.write_text(json.dumps(asdict(self)), encoding="utf-8")
        new.replace(folder / _RECORD)


class SpreadChanges:
    """Changes of the adapters of all replicas, one after the other."""

    def __init__(self, replicas: Any, root: AdapterRoot, onnx_dir: Path, folder: Path) -> None:
        """Take the replicas."""
        self._replicas, self._root, self._onnx_dir, self._folder = replicas, root, onnx_dir, folder
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str, *, may_replace: bool, pin: bool) -> None:
        """Load the adapter at a path of the root under a name, in every replica or none."""
        async with self._lock:
            shared = SharedAdapters.read(self._folder)
            folder = self._folder / str(shared.number + 1)
            shutil.rmtree(folder, ignore_errors=True)  # of a frontend that ended
            folder.mkdir()
            try:
                if pin:
                    copy = await run_in_threadpool(self._root.copy, path, name, self._onnx_dir, folder)
                    path = str(copy.relative_to(self._folder))
                await self._spread("prepare", name, path, may_replace, pin)
            except BaseException:
                await self._spread("discard", is_sure=False)
                shutil.rmtree(folder, ignore_errors=True)
                raise
            others = shared.without(name)
            if pin:
                await self._settle(replace(others, loaded={**others.loaded, name: path}))
            else:
                await self._settle(replace(others, named={**others.named, name: path}))

    async def unload(self, name: str) -> None:
        """Take an adapter's name away in every replica."""
        async with self._lock:
            shared = SharedAdapters.read(self._folder)
            await self._spread("check_there", name)
            others = shared.without(name)
            await self._settle(replace(others, unloaded=(*others.unloaded, name)))

    async def _settle(self, shared: SharedAdapters) -> None:
        old = SharedAdapters.read(self._folder).loaded
        replace(shared, number=shared.number + 1).write(self._folder)
        await self._spread("settle", is_sure=False)  # a replica that does not hear it reads the record later
        for file in {*old.values()} - {*shared.loaded.values()}:
            shutil.rmtree(self._folder / Path(file).parts[0], ignore_errors=True)

    async def _spread(self, step: str, *arguments: object, is_sure: bool = True) -> None:
        """Let every replica take a step of a change, and raise what one of them says is wrong, if that is asked for."""
        try:
            answers = await self._replicas.broadcast("change", step, *arguments).results_async(return_exceptions=True)
        except RayServeException as error:
            answers = [error]
        problems = [answer for answer in answers if isinstance(answer, Exception)]
        if problems and is_sure:
            known = [problem for problem in problems if isinstance(problem, GraloraError)]
            raise (
                known[0]
                if known
                else UnevenReplicasError(
                    f"a replica ended meanwhile, and nothing was changed ({first_line(problems[0])}); try again"
                )
            )


class ReplicaAdapters:
    """The adapters of one replica, as the record has them."""

    def __init__(self, engine: Engine, adapters: RootAdapters, folder: Path) -> None:
        """Begin without those of the record; `settle` loads them."""
        self._engine, self._adapters, self._folder = engine, adapters, folder
        self._prepared: dict[tuple[str, str], AdapterVersion] = {}  # by the name and the file
        self._applied = SharedAdapters()
        self._lock = asyncio.Lock()

    async def prepare(self, name: str, file: str, may_replace: bool, pin: bool) -> GraloraError | None:
        """Load an adapter whose name does not stand for it yet, or say why that is not possible."""

        def work() -> None:
            self._prepared[name, file] = self._load(name, file, may_replace=may_replace, pin=pin)

        return await self._problem_of(work)

    async def discard(self) -> None:
        """Give up what was prepared."""
        prepared, self._prepared = self._prepared, {}
        for version in prepared.values():
            self._engine.models.release(version.key)

    async def check_there(self, name: str) -> GraloraError | None:
        """Say what is wrong with taking a name away."""
        return await self._problem_of(lambda: self._adapters.check_there(name))

    async def settle(self) -> None:
        """Do what the record says, if that is not done."""
        async with self._lock:
            shared = await run_in_threadpool(SharedAdapters.read, self._folder)
            if shared.number != self._applied.number:
                await self._changed(lambda: self._apply(shared))

    def _apply(self, shared: SharedAdapters) -> None:
        before, models = self._applied, self._engine.models
        for name in shared.unloaded:
            if name not in before.unloaded and (name in models.adapters or models.knows(name)):
                self._adapters.withdraw(name)
        for name, file in shared.loaded.items():
            if before.loaded.get(name) != file:
                version = self._prepared.pop((name, file), None) or self._load(name, file, may_replace=True, pin=True)
                self._adapters.commit(version, "")
        for name, path in shared.named.items():
            if (prepared := self._prepared.pop((name, path), None)) is not None:
                self._adapters.commit(prepared, path)
            elif before.named.get(name) != path:
                self._adapters.point(name, path)
        self._applied = shared

    def _load(self, name: str, file: str, *, may_replace: bool, pin: bool) -> AdapterVersion:
        if not pin:
            return self._adapters.prepare(name, file, may_replace=may_replace, pin=False)
        return load_adapter(self._engine, name, lambda: self._folder / file, may_replace=may_replace)

    async def _problem_of(self, work: Callable[[], None]) -> GraloraError | None:
        try:
            await self._changed(work)
        except GraloraError as error:
            return error
        return None

    async def _changed(self, work: Callable[[], None]) -> None:
        await asyncio.shield(asyncio.wrap_future(self._engine.models.change(work)))
