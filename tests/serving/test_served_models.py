"""Versions of adapters: a name stands for one at a time, and others stay while requests hold them."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gralora_fx.errors import ServingError
from gralora_fx.service.scheduling.adapter_versions import (
    AdapterLimitError,
    AdapterLimits,
    AdaptersInUseError,
    TooManyChangesError,
    UnknownAdapterError,
    UnknownModelError,
)
from gralora_fx.service.scheduling.served_models import ServedModels

ANY = Path("any")


class Host:
    """Holds keys instead of adapters."""

    def __init__(self, *keys: str) -> None:
        self.adapters: Any = self
        self.keys = set(keys)

    def available(self) -> list[str]:
        return sorted(self.keys)

    def __getitem__(self, key: str) -> Any:
        """What is loaded under a key."""
        assert key in self.keys
        return SimpleNamespace(size=10)

    def load_adapter(self, name: str, path: str | Path) -> None:
        assert name not in self.keys
        self.keys.add(name)

    def unload_adapter(self, name: str) -> None:
        self.keys.remove(name)


def load(models: ServedModels, name: str, *, replace: bool = True, **how: Any) -> None:
    def work() -> None:
        models.commit(models.prepare(name, ANY, lambda _: None, replace=replace, **how))

    models.change(work).result(10)


def key_of(models: ServedModels, name: str) -> str | None:
    """The key of a name's version now."""
    with models.held(name) as key:
        return key


def settle(models: ServedModels) -> None:
    """Wait until what was to be freed is."""
    models.change(lambda: None).result(10)


def test_a_held_version_outlives_its_name() -> None:
    host = Host("a")
    models = ServedModels("base", host)
    load(models, "a")
    settle(models)
    assert host.keys == {"a.2"}  # nobody held the first
    with models.held("a") as key:
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
    models.unload("a")
    settle(models)  # the hold that failed left no hold on the other
    assert host.keys == set()


def test_unloading_takes_the_name_at_once() -> None:
    host = Host("a", "b")
    models = ServedModels("base", host)
    with models.held("a"):
        models.unload("a")
        assert models.adapters == ("b",)
        with pytest.raises(UnknownAdapterError, match=r"no adapter 'a' is loaded; loaded is b"):
            models.unload("a")
        with pytest.raises(UnknownModelError, match=r"no model 'a'; there is base, b"):
            key_of(models, "a")
        load(models, "a", replace=False)
        settle(models)
        assert host.keys == {"a", "b", "a.2"}
    settle(models)
    assert host.keys == {"b", "a.2"}


def test_a_failed_load_changes_nothing() -> None:
    host = Host("a")
    models = ServedModels("base", host)

    def fail(_: str) -> None:
        raise ServingError("not finite")

    for name in ("a", "b"):
        with pytest.raises(ServingError, match="not finite"):
            models.prepare(name, ANY, fail, replace=True)
    for name, message in (("a", "is loaded already; give load_inplace"), ("../a", "is not a name"), ("", "is not")):
        with pytest.raises(ServingError, match=message):
            models.prepare(name, ANY, fail, replace=False)
    assert host.keys == {"a"}
    assert key_of(models, "a") == "a"


def test_a_key_is_nobody_elses() -> None:
    host = Host("a", "a.2", "a.3")
    models = ServedModels("base", host)
    load(models, "a")
    assert key_of(models, "a") == "a.4"
    load(models, "b" * 128)
    assert len(key_of(models, "b" * 128)) < 128


def test_changes_wait_up_to_a_bound() -> None:
    models, began, go = ServedModels("base", Host()), threading.Event(), threading.Event()

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


def test_a_version_that_was_prepared_has_no_name_until_it_is_committed() -> None:
    host = Host("a")
    models = ServedModels("base", host)
    first = models.prepare("a", ANY, lambda _: None, replace=True)
    assert (key_of(models, "a"), len(models)) == ("a", 2)
    models.release(first.key)
    settle(models)
    assert host.keys == {"a"}
    models.commit(models.prepare("a", ANY, lambda _: None, replace=True))
    settle(models)
    assert (key_of(models, "a"), host.keys) == ("a.3", {"a.3"})


@pytest.mark.quick
@pytest.mark.parametrize("limits", [AdapterLimits(count=3), AdapterLimits(memory=39), AdapterLimits(3, 30)])
def test_the_least_recently_used_goes_but_none_that_is_held_or_pinned(limits: AdapterLimits) -> None:
    host, evicted = Host("pinned"), list[int]()
    models = ServedModels("base", host, limits)
    models.when_evicted = lambda: evicted.append(1)
    for name in ("a", "b"):
        load(models, name, pin=False)
    assert key_of(models, "a") == "a.2"  # so that b is the least recently used
    load(models, "c", pin=False)
    assert (models.adapters, host.keys, models.memory) == (("a", "c", "pinned"), {"a.2", "c.4", "pinned"}, 30)
    with models.held("a"):
        load(models, "d", pin=False)
        assert models.adapters == ("a", "d", "pinned")
        with models.held("d"):
            with pytest.raises(AdaptersInUseError, match="no room for 'e': requests run with all others"):
                load(models, "e", pin=False)
            assert models.running == ("a", "d")
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
        ServedModels("base", Host("a", "b"), AdapterLimits(count=1))
    with pytest.raises(AdapterLimitError, match=r"max_adapter_memory is 19 bytes.*raise --max-adapter-memory"):
        ServedModels("base", Host("a", "b"), AdapterLimits(memory=19))
