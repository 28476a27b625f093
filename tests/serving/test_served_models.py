"""Versions of adapters: a name stands for one at a time, and others stay while requests hold them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.request_errors import (
    AdapterLimitError,
    AdaptersInUseError,
    TooManyChangesError,
    UnknownAdapterError,
    UnknownModelError,
)
from gralora_fx.service.adapter_store.adapter_versions import AdapterLimits
from gralora_fx.service.adapter_store.store import AdapterStore


class Host:
    """Holds keys instead of adapters."""

    def __init__(self, *keys: str) -> None:
        self.adapters: Any = self
        self.keys = set(keys)
        self.manifest = SimpleNamespace(adapter_inputs=1, adapters=())

    def available(self) -> list[str]:
        return sorted(self.keys)

    def __getitem__(self, key: str) -> Any:
        """Return the model that is loaded under a key."""
        assert key in self.keys
        return SimpleNamespace(size=10)

    def load_adapter(self, name: str, path: str | Path) -> None:
        assert name not in self.keys
        self.keys.add(name)

    def unload_adapter(self, name: str) -> None:
        self.keys.remove(name)


@dataclass(frozen=True)
class File:
    """Stands for the file of an adapter, as it is at a time."""

    path: str = ""
    state: int = 0

    def read(self, name: str, manifest: object) -> Path:
        return Path(name)


class Trial:
    """Tries adapters, some of which the model does not run with."""

    by_requests = False

    def __init__(self) -> None:
        self.problem: Exception | None = None

    def __call__(self, key: str) -> None:
        if self.problem is not None:
            raise self.problem


def store(*keys: str, limits: AdapterLimits | None = None) -> tuple[AdapterStore, Host]:
    """Return a store, and what holds its adapters."""
    host: Any = Host(*keys)
    made = AdapterStore("base", host, limits)
    made.trial = Trial()  # type: ignore[assignment]
    return made, host


def stage(models: AdapterStore, name: str, **how: Any) -> Any:
    return models.stage(name, File(), **{"may_replace": True, **how})  # type: ignore[arg-type]


def load(models: AdapterStore, name: str, **how: Any) -> None:
    models.change(lambda: models.serve(stage(models, name, **how))).result(10)


@contextmanager
def held(models: AdapterStore, name: str) -> Iterator[str]:
    """Hold a name's version now."""
    version = models.hold_named(name)
    assert version is not None
    yield version.key
    models.release(version.key)


def key_of(models: AdapterStore, name: str) -> str:
    """Return the key of a name's version now."""
    with held(models, name) as key:
        return key


async def used(models: AdapterStore, name: str) -> str | None:
    async with models.use(name) as key:
        return key


def running(models: AdapterStore) -> tuple[str, ...]:
    """Return the adapters that requests run with, or are about to."""
    return tuple(sorted({version.name for version in models._versions.values() if version.holds}))


def settle(models: AdapterStore) -> None:
    """Wait until what was to be freed is."""
    models.change(lambda: None).result(10)


def test_a_held_version_outlives_its_name() -> None:
    models, host = store("a")
    load(models, "a")
    settle(models)
    assert host.keys == {"a.2"}  # nobody held the first
    with held(models, "a") as key:
        load(models, "a")
        settle(models)
        assert key == "a.2"
        assert key_of(models, "a") == "a.3"
        assert host.keys == {"a.2", "a.3"}
        assert len(models) == 2
        models.hold(key)
    settle(models)
    assert host.keys == {"a.2", "a.3"}
    models.release(key)
    settle(models)
    assert host.keys == {"a.3"}
    with pytest.raises(UnknownModelError, match=r"'a\.2' was unloaded"):
        models.hold("a.3", "a.2")
    models.drop("a")
    settle(models)  # the hold that failed left no hold on the other
    assert host.keys == set()


def test_unloading_takes_the_name_at_once() -> None:
    models, host = store("a", "b")
    with held(models, "a"):
        models.drop("a")
        assert models.adapters == ("b",)
        with pytest.raises(UnknownAdapterError, match=r"no adapter 'a' is loaded; loaded is b"):
            models.drop("a")
        with pytest.raises(UnknownModelError, match=r"no model 'a'; there is base, b"):
            asyncio.run(used(models, "a"))
        load(models, "a", may_replace=False)
        settle(models)
        assert host.keys == {"a", "b", "a.2"}
    settle(models)
    assert host.keys == {"b", "a.2"}


def test_a_failed_load_changes_nothing() -> None:
    models, host = store("a")
    models.trial.problem = ServingError("not finite")  # type: ignore[attr-defined]
    for name in ("a", "b"):
        with pytest.raises(ServingError, match="not finite"):
            stage(models, name)
    for name, message in (("a", "is loaded already; give load_inplace"), ("../a", "is not a name"), ("", "is not")):
        with pytest.raises(ServingError, match=message):
            stage(models, name, may_replace=False)
    with pytest.raises(ServingError, match="'base' is the name of the base"):
        stage(models, "base")
    assert host.keys == {"a"}
    assert key_of(models, "a") == "a"


def test_a_key_is_nobody_elses() -> None:
    models, _ = store("a", "a.2", "a.3")
    load(models, "a")
    assert key_of(models, "a") == "a.4"
    load(models, "b" * 128)
    assert len(key_of(models, "b" * 128)) < 128


def test_changes_wait_up_to_a_bound() -> None:
    (models, _), began, go = store(), threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        go.wait(10)

    changes = [models.change(wait)]
    assert began.wait(10)
    changes += [models.change(lambda: None) for _ in range(16)]
    with pytest.raises(TooManyChangesError, match="16 changes of adapters wait"):
        models.change(lambda: None)
    go.set()
    for change in changes:
        change.result(10)
    settle(models)


def test_a_version_that_was_staged_has_no_name_until_it_is_served() -> None:
    models, host = store("a")
    first = stage(models, "a")
    assert (key_of(models, "a"), len(models)) == ("a", 2)
    models.release(first.key)
    settle(models)
    assert host.keys == {"a"}
    models.serve(stage(models, "a"))
    settle(models)
    assert (key_of(models, "a"), host.keys) == ("a.3", {"a.3"})


@pytest.mark.quick
@pytest.mark.parametrize("limits", [AdapterLimits(count=3), AdapterLimits(memory=39), AdapterLimits(3, 30)])
def test_the_least_recently_used_goes_but_none_that_is_held_or_pinned(limits: AdapterLimits) -> None:
    (models, host), evicted = store("pinned", limits=limits), list[int]()
    models.when_evicted = lambda: evicted.append(1)
    for name in ("a", "b"):
        load(models, name, pin=False)
    assert key_of(models, "a") == "a.2"  # so that b is the least recently used
    load(models, "c", pin=False)
    assert (models.adapters, host.keys, models.memory) == (("a", "c", "pinned"), {"a.2", "c.4", "pinned"}, 30)
    with held(models, "a"):
        load(models, "d", pin=False)
        assert models.adapters == ("a", "d", "pinned")
        with held(models, "d"):
            with pytest.raises(AdaptersInUseError, match="no room for 'e': requests run with all others"):
                load(models, "e", pin=False)
            assert running(models) == ("a", "d")
    settle(models)
    assert len(models) == 3
    load(models, "e")
    load(models, "f")
    with pytest.raises(AdapterLimitError, match=r"no room for 'g'.*max_adapter.* and 3 adapters of 30 bytes stay"):
        load(models, "g")
    assert models.adapters == ("e", "f", "pinned")
    assert len(evicted) == 4


def test_the_limits_hold_from_the_start() -> None:
    with pytest.raises(AdapterLimitError, match=r"max_adapters is 1, and 2 adapters of 20 bytes stay.*--max-adapters"):
        store("a", "b", limits=AdapterLimits(count=1))
    with pytest.raises(AdapterLimitError, match=r"max_adapter_memory is 19 bytes.*raise --max-adapter-memory"):
        store("a", "b", limits=AdapterLimits(memory=19))
