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

from gralora_fx.errors import GraloraError, ServingError, first_line
from gralora_fx.serving.http.adapter_loads import load_adapter
from gralora_fx.serving.http.adapter_root import AdapterRoot
from gralora_fx.serving.http.engines import Engine
from gralora_fx.serving.http.root_adapters import RootAdapters
from gralora_fx.serving.scheduling.adapter_versions import AdapterVersion
from gralora_fx.serving.scheduling.queue import StoppedError

_RECORD = "adapters.json"


class UnevenReplicasError(StoppedError):
    """A replica ended while an adapter was loaded."""


@dataclass(frozen=True)
class SharedAdapters:
    """What requests have loaded and unloaded.

    Attributes:
        number: How many changes there were.
        loaded: The file of each adapter by its name, below the folder.
        unloaded: Names that were taken away.
    """

    number: int = 0
    loaded: Mapping[str, str] = field(default_factory=dict)
    unloaded: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> SharedAdapters:
        """What the record of a folder says; nothing if there is none."""
        try:
            fields = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        return cls(fields["number"], fields["loaded"], tuple(fields["unloaded"]))

    def write(self, folder: Path) -> None:
        """Write the record, as a whole."""
        new = folder / f"{_RECORD}.new"
        new.write_text(json.dumps(asdict(self)), encoding="utf-8")
        new.replace(folder / _RECORD)


class SpreadChanges:
    """Changes of the adapters of all replicas, one after the other."""

    def __init__(self, replicas: Any, root: AdapterRoot, onnx_dir: Path, folder: Path) -> None:
        """Take the replicas.

        Args:
            replicas: Ray's handle of them.
            root: Where adapters may be.
            onnx_dir: The export.
            folder: The folder of the record.
        """
        self._replicas, self._root, self._onnx_dir, self._folder = replicas, root, onnx_dir, folder
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str, *, may_replace: bool, pin: bool) -> None:
        """Load the adapter at a path of the root under a name, in every replica or none.

        Raises:
            UnevenReplicasError: A replica ended meanwhile.
            GraloraError: As of `RootAdapters.prepare`.
        """
        if not pin:
            raise ServingError("pin=false is not supported with --engine ray; an adapter of the root needs no load")
        async with self._lock:
            shared = SharedAdapters.read(self._folder)
            folder = self._folder / str(shared.number + 1)
            shutil.rmtree(folder, ignore_errors=True)  # of a frontend that ended
            folder.mkdir()
            try:
                file = await run_in_threadpool(self._root.copy, path, name, self._onnx_dir, folder)
                await self._spread("prepare", name, str(file), may_replace)
            except BaseException:
                await self._spread("discard", is_sure=False)
                shutil.rmtree(folder, ignore_errors=True)
                raise
            loaded = {**shared.loaded, name: str(file.relative_to(self._folder))}
            await self._settle(replace(shared, loaded=loaded, unloaded=_without(shared.unloaded, name)))

    async def unload(self, name: str) -> None:
        """Take an adapter's name away in every replica.

        Raises:
            UnknownAdapterError: There is no adapter of the name.
        """
        async with self._lock:
            shared = SharedAdapters.read(self._folder)
            await self._spread("check_there", name)
            loaded = {other: file for other, file in shared.loaded.items() if other != name}
            await self._settle(replace(shared, loaded=loaded, unloaded=(*_without(shared.unloaded, name), name)))

    async def _settle(self, shared: SharedAdapters) -> None:
        old = SharedAdapters.read(self._folder).loaded
        replace(shared, number=shared.number + 1).write(self._folder)
        await self._spread("settle", is_sure=False)  # a replica that does not hear it reads the record later
        for file in {*old.values()} - {*shared.loaded.values()}:
            shutil.rmtree(self._folder / Path(file).parts[0], ignore_errors=True)

    async def _spread(self, method: str, *arguments: object, is_sure: bool = True) -> None:
        """Call a method of every replica, and raise what one of them says is wrong, if that is asked for."""
        try:
            answers = await self._replicas.broadcast(method, *arguments).results_async(return_exceptions=True)
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


def _without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


class ReplicaAdapters:
    """The adapters of one replica, as the record has them."""

    def __init__(self, engine: Engine, adapters: RootAdapters, folder: Path) -> None:
        """Begin without those of the record; `settle` loads them.

        Args:
            engine: What runs them.
            adapters: Those of the root.
            folder: The folder of the record.
        """
        self._engine, self._adapters, self._folder = engine, adapters, folder
        self._prepared: dict[str, AdapterVersion] = {}  # by the file
        self._applied = SharedAdapters()
        self._lock = asyncio.Lock()

    async def prepare(self, name: str, file: str, may_replace: bool) -> GraloraError | None:
        """Load an adapter whose name does not stand for it yet, or say why that is not possible."""

        def work() -> None:
            self._prepared[file] = self._load(name, Path(file), may_replace=may_replace)

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
        """Do what the record says, if that is not done.

        Raises:
            GraloraError: An adapter of the record cannot be loaded.
        """
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
                path = self._folder / file
                version = self._prepared.pop(str(path), None) or self._load(name, path, may_replace=True)
                self._adapters.commit(version, "")
        self._applied = shared

    def _load(self, name: str, file: Path, *, may_replace: bool) -> AdapterVersion:
        return load_adapter(self._engine, name, lambda: file, may_replace=may_replace)

    async def _problem_of(self, work: Callable[[], None]) -> GraloraError | None:
        try:
            await self._changed(work)
        except GraloraError as error:
            return error
        return None

    async def _changed(self, work: Callable[[], None]) -> None:
        await asyncio.shield(asyncio.wrap_future(self._engine.models.change(work)))
