"""Adapters that requests name before they are loaded: once for all, within limits, not again after a failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from test_served_models import File, running, settle, store

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.request_errors import (
    AdapterLoadError,
    DeadlineError,
    TooManyChangesError,
    UnknownModelError,
)
from gralora_fx.service.adapter_store.adapter_versions import AdapterLimits


class Files:
    """Adapters of which each has a number as its state, and some of which cannot be loaded."""

    def __init__(self, *names: str) -> None:
        self.states: dict[str, int] = dict.fromkeys(names, 1)
        self.broken: dict[str, Exception] = {}
        self.loads: list[str] = []
        self.opened = threading.Event()
        self.opened.set()

    by_requests = False

    def names(self) -> list[str]:
        return sorted(self.states)

    def find(self, name: str) -> File | None:
        return Found(name, self.states[name], self) if name in self.states else None

    def take_name(self, name: str) -> None:
        """Leave the files as they are."""

    def __call__(self, key: str) -> None:
        """Try an adapter."""
        name = key.partition(".")[0]
        if name in self.broken:
            raise self.broken[name]


@dataclass(frozen=True)
class Found(File):
    """An adapter as its files are now."""

    files: Any = field(default=None, compare=False)

    def read(self, name: str, manifest: object) -> Any:
        self.files.loads.append(name)
        assert self.files.opened.wait(10)
        return super().read(name, manifest)


def served(files: Files, *own: str, count: int | None = None, most: int = 8) -> tuple[Any, Any]:
    models, _ = store(*own, limits=AdapterLimits(count))
    models.files, models.trial, models.pending.most = files, files, most  # type: ignore[assignment]
    return models, models.pending


async def ask(models: Any, name: str, during: Callable[[], Coroutine[Any, Any, None]] | None = None) -> str:
    async with models.use(name, 10) as key:
        if during is not None:
            await during()
        return str(key)


def test_what_is_missing_is_loaded_once_for_all_that_wait() -> None:
    source = Files("a", "b")
    models, adapters = served(source, "own")

    async def run() -> list[str]:
        source.opened.clear()
        asked = [asyncio.create_task(ask(models, name)) for name in ("a", "a", "b", "a")]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (adapters.names, adapters.requests) == (("a", "b"), 4)
        assert await ask(models, "own") == "own"  # waits for nothing
        source.opened.set()
        return await asyncio.gather(*asked)

    assert models.available == ("a", "b", "own")
    assert asyncio.run(run()) == ["a.2", "a.2", "b.3", "a.2"]
    assert asyncio.run(ask(models, "a")) == "a.2"
    assert source.loads == ["a", "b"]
    with pytest.raises(UnknownModelError, match="no model 'c'; there is base, a, b, own, and those of the"):
        asyncio.run(ask(models, "c"))
    assert adapters.names == running(models) == ()


def test_a_failure_is_remembered_until_the_files_change() -> None:
    source = Files("a", "b")
    models, _ = served(source)
    source.broken["a"] = ServingError("not finite")
    for _ in range(3):
        with pytest.raises(AdapterLoadError, match="the adapter 'a' cannot be loaded: not finite") as caught:
            asyncio.run(ask(models, "a"))
        assert caught.value.field == "model"
    assert source.loads == ["a"]
    source.states["a"] = 2
    source.broken.clear()
    assert asyncio.run(ask(models, "a")) == "a.3"


def test_a_failure_that_nobody_knows_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    source = Files("a")
    models, _ = served(source)
    source.broken["a"] = ValueError("a secret")
    with pytest.raises(AdapterLoadError, match="the log of the server says why"):
        asyncio.run(ask(models, "a"))
    assert "a secret" in caplog.text


def test_files_that_change_are_a_new_version_and_damaged_ones_leave_the_old() -> None:
    source = Files("a")
    models, _ = served(source, count=1)
    assert asyncio.run(ask(models, "a")) == "a.2"
    source.states["a"] = 2
    assert asyncio.run(ask(models, "a")) == "a.3"
    source.states["a"], source.broken["a"] = 3, ServingError("cut short")
    assert [asyncio.run(ask(models, "a")) for _ in range(2)] == ["a.3", "a.3"]
    assert source.loads == ["a"] * 3
    del source.states["a"]
    with pytest.raises(UnknownModelError):
        asyncio.run(ask(models, "a"))
    settle(models)
    assert models.adapters == ()


def test_a_load_waits_for_room_and_holds_nobody_up() -> None:
    source = Files("a", "b", "c")
    models, adapters = served(source, count=1)

    async def run() -> str:
        waiting: list[asyncio.Task[str]] = []

        async def others() -> None:
            waiting.append(asyncio.create_task(ask(models, "b")))
            while source.loads != ["a", "b"]:
                await asyncio.sleep(0.001)
            assert adapters.names == ("b",)
            with pytest.raises(DeadlineError, match="'c' was not loaded in time"):
                async with models.use("c", 0.02):
                    pass
            assert await ask(models, "a") == "a.2"
            assert not waiting[0].done()

        await ask(models, "a", others)
        return await waiting[0]

    assert asyncio.run(run()).startswith("b.")
    assert (models.adapters, running(models)) == (("b",), ())


def test_a_request_that_gives_up_leaves_no_hold() -> None:
    source = Files("a")
    models, adapters = served(source)

    async def run() -> None:
        source.opened.clear()
        asked = [asyncio.create_task(ask(models, "a")) for _ in range(2)]
        await asyncio.sleep(0.005)
        asked[0].cancel()
        await asyncio.sleep(0.005)
        source.opened.set()
        assert await asked[1] == "a.2"

    asyncio.run(run())
    assert (running(models), adapters.requests) == ((), 0)


def test_those_that_wait_are_bounded() -> None:
    source = Files("a", "b")
    models, _ = served(source, most=1)

    async def run() -> None:
        source.opened.clear()
        first = asyncio.create_task(ask(models, "a"))
        await asyncio.sleep(0.005)
        with pytest.raises(TooManyChangesError, match="1 requests wait for adapters to be loaded"):
            await ask(models, "b")
        source.opened.set()
        await first

    asyncio.run(run())


def test_random_requests_all_get_their_adapter() -> None:
    source = Files(*(f"n{n}" for n in range(20)))
    models, _ = served(source, "own", count=4, most=200)

    async def one(number: int) -> None:
        name = f"n{number * number % 20}"

        async def during() -> None:
            for _ in range(number % 7):
                await asyncio.sleep(0)
            if number % 11 == 0:
                source.states[name] += 1

        assert (await ask(models, name, during)).partition(".")[0] == name

    async def run() -> None:
        await asyncio.gather(*(one(number) for number in range(200)))

    asyncio.run(run())
    settle(models)
    assert len(models) <= 4
    assert running(models) == ()


def test_a_load_without_room_is_tried_again_after_any_change() -> None:
    """Also after one that a replica hears of from the others."""
    models, _ = served(Files("a"), "own", count=1)
    for _ in range(2):
        with pytest.raises(AdapterLoadError, match="'a' cannot be loaded: there is no room for 'a': max_adapters is 1"):
            asyncio.run(ask(models, "a"))
    asyncio.run(models.changed(lambda: models.drop("own")))
    assert asyncio.run(ask(models, "a")) == "a.2"
