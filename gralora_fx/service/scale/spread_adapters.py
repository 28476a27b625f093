"""Forwarding to replicas: requests to one, changes of adapters to all or none."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from ray.serve.exceptions import RayServeException
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import ASGIApp, Message

from gralora_fx.errors import GraloraError, first_line
from gralora_fx.run.generate.request_errors import StoppedError
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot
from gralora_fx.service.adapter_store.adapter_versions import AdapterVersion, GivenFile
from gralora_fx.service.adapter_store.store import AdapterStore

_SCOPE = ("asgi", "client", "headers", "http_version", "method", "path", "query_string", "raw_path", "scheme", "server")
_MODEL_PATHS = "/v2/models/"


@dataclass(frozen=True)
class AsgiRequest:
    """A request with its whole body."""

    scope: dict[str, Any]  # the ASGI scope, as plain data
    body: bytes

    @property
    def path(self) -> str:
        """The URL's path."""
        return str(self.scope["path"])

    @property
    def model(self) -> str | None:
        """The model named in the path, the query or the body; None if there is none."""
        if self.path.startswith(_MODEL_PATHS):
            return self.path.removeprefix(_MODEL_PATHS).partition("/")[0]
        if named := parse_qs(self.scope.get("query_string", b"")).get(b"model"):
            return str(named[-1], errors="replace")
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):  # the handler reports it
            return None
        model = body.get("model") if isinstance(body, dict) else None
        return model if isinstance(model, str) else None


async def read(request: Request) -> AsgiRequest:
    """Read a request with its body."""
    scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
    return AsgiRequest({"type": "http", "root_path": "", **scope}, await request.body())


async def answer(app: ASGIApp, request: AsgiRequest) -> AsyncIterator[Message]:
    """Yield the messages with which an app answers a request, as they come.

    Closing the iterator early, when a client disconnects, cancels the app's work.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        return await asyncio.Future()  # the client stays until the work is cancelled

    working = asyncio.ensure_future(app({**request.scope}, receive, messages.put))
    working.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
            if message["type"] == "http.response.body" and not message.get("more_body"):
                return
        working.result()
    finally:
        working.cancel()


_RECORD = "adapters.json"


class UnevenReplicasError(StoppedError):
    """A replica ended during an adapter load."""


@dataclass(frozen=True)
class SharedAdapters:
    """Record of the adapters that requests have loaded and unloaded."""

    number: int = 0  # number of changes
    loaded: Mapping[str, str] = field(default_factory=dict)  # the file of each adapter by name, below the folder
    named: Mapping[str, str] = field(default_factory=dict)  # the path in the root of each adapter that is not pinned
    unloaded: tuple[str, ...] = ()  # hidden names

    @classmethod
    def read(cls, folder: Path) -> SharedAdapters:
        """Read a folder's record; an empty one if there is none."""
        try:
            fields = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        return cls(**{**fields, "unloaded": tuple(fields["unloaded"])})

    def without(self, name: str) -> SharedAdapters:
        """Return a copy without any entry for `name`."""
        loaded, named = ({n: file for n, file in files.items() if n != name} for files in (self.loaded, self.named))
        return SharedAdapters(self.number, loaded, named, tuple(other for other in self.unloaded if other != name))

    def write(self, folder: Path) -> None:
        """Write the record atomically."""
        new = folder / f"{_RECORD}.new"
        new.write_text(json.dumps(asdict(self)), encoding="utf-8")
        new.replace(folder / _RECORD)


class SpreadChanges:
    """Changes the adapters of all replicas, one change at a time."""

    def __init__(self, replicas: Any, root: AdapterRoot, onnx_dir: Path, folder: Path) -> None:
        """Set the replicas."""
        self._replicas, self._root, self._onnx_dir, self._folder = replicas, root, onnx_dir, folder
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str, *, may_replace: bool, pin: bool) -> None:
        """Load the adapter at a path of the root under a name, in every replica or none."""
        async with self._lock:
            shared = SharedAdapters.read(self._folder)
            folder = self._folder / str(shared.number + 1)
            shutil.rmtree(folder, ignore_errors=True)  # left by a frontend that died
            folder.mkdir()
            try:
                if pin:
                    copy = await run_in_threadpool(self._root.copy, path, name, self._onnx_dir, folder)
                    path = str(copy.relative_to(self._folder))
                await self._spread("stage", name, path, may_replace, pin)
            except BaseException:
                await self._spread("discard", is_sure=False)
                shutil.rmtree(folder, ignore_errors=True)
                raise
            others = shared.without(name)
            if pin:
                await self._record(replace(others, loaded={**others.loaded, name: path}))
            else:
                await self._record(replace(others, named={**others.named, name: path}))

    async def evict(self, name: str) -> None:
        """Unload an adapter and hide its name in every replica."""
        async with self._lock:
            shared = SharedAdapters.read(self._folder)
            await self._spread("check", name)
            others = shared.without(name)
            await self._record(replace(others, unloaded=(*others.unloaded, name)))

    async def _record(self, shared: SharedAdapters) -> None:
        old = SharedAdapters.read(self._folder).loaded
        replace(shared, number=shared.number + 1).write(self._folder)
        await self._spread("follow", is_sure=False)  # a replica that misses it reads the record later
        for file in {*old.values()} - {*shared.loaded.values()}:
            shutil.rmtree(self._folder / Path(file).parts[0], ignore_errors=True)

    async def _spread(self, step: str, *arguments: object, is_sure: bool = True) -> None:
        """Run a step of a change in every replica; with `is_sure`, raise if it failed in one."""
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
    """Keeps one replica's adapters in step with the record."""

    def __init__(self, models: AdapterStore, folder: Path) -> None:
        """Start without the record's adapters; `follow` loads them."""
        assert models.files is not None
        self._models, self._files, self._folder = models, models.files, folder
        self._staged: dict[tuple[str, str], AdapterVersion] = {}  # by the name and the file
        self._applied = SharedAdapters()
        self._lock = asyncio.Lock()

    async def stage(self, name: str, file: str, may_replace: bool, pin: bool) -> GraloraError | None:
        """Load an adapter without serving it yet; return the error, if any."""

        def work() -> None:
            self._staged[name, file] = self._stage(name, file, may_replace=may_replace, pin=pin)

        return await self._problem_of(work)

    async def discard(self) -> None:
        """Drop the staged adapters."""
        staged, self._staged = self._staged, {}
        for version in staged.values():
            self._models.release(version.key)

    async def check(self, name: str) -> GraloraError | None:
        """Return why an adapter cannot be evicted; None if it can."""
        return await self._problem_of(lambda: self._models.check_adapter(name))

    async def follow(self) -> None:
        """Apply changes of the record that this replica has not applied yet."""
        async with self._lock:
            shared = await run_in_threadpool(SharedAdapters.read, self._folder)
            if shared.number != self._applied.number:
                await self._models.changed(lambda: self._apply(shared))

    def _apply(self, shared: SharedAdapters) -> None:
        before, models = self._applied, self._models
        for name in shared.unloaded:
            if name not in before.unloaded and models.knows(name):
                models.drop(name)
        for name, file in shared.loaded.items():
            if before.loaded.get(name) != file:
                staged = self._staged.pop((name, file), None)
                models.serve(staged or self._stage(name, file, pin=True))
        for name, path in shared.named.items():
            staged = self._staged.pop((name, path), None)
            if staged is not None:
                models.serve(staged)
            elif before.named.get(name) != path:  # it is loaded when a request names it
                if name in models.adapters:
                    models.drop(name)
                self._files.give_name(name, path)
        self._applied = shared

    def _stage(self, name: str, file: str, *, may_replace: bool = True, pin: bool) -> AdapterVersion:
        place = GivenFile(self._folder / file, self._files.onnx_dir) if pin else self._files.at(file)
        return self._models.stage(name, place, may_replace=may_replace, pin=pin)

    async def _problem_of(self, work: Callable[[], None]) -> GraloraError | None:
        try:
            await self._models.changed(work)
        except GraloraError as error:
            return error
        return None
