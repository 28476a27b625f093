"""Versions of adapters: a name stands for one at a time, and others stay while requests hold them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from gralora_fx.errors import ServingError
from gralora_fx.serving.scheduling.adapter_versions import AdapterVersions, TooManyChangesError, UnknownAdapterError

ANY = Path("any")


class Host:
    """Holds keys instead of adapters."""

    def __init__(self, *keys: str) -> None:
        self.adapters: Any = self
        self.keys = set(keys)

    def available(self) -> list[str]:
        return sorted(self.keys)

    def load_adapter(self, name: str, path: str | Path) -> None:
        assert name not in self.keys
        self.keys.add(name)

    def unload_adapter(self, name: str) -> None:
        self.keys.remove(name)


class Disposed(list[str]):
    """Collects what was disposed of."""

    def of(self, name: str) -> Any:
        return lambda: self.append(name)


def load(versions: AdapterVersions, name: str, *, replace: bool = True, dispose: Any = lambda: None) -> None:
    versions.change(lambda: versions.load(name, ANY, lambda _: None, replace=replace, dispose=dispose)).result(10)


def key_of(versions: AdapterVersions, name: str) -> str:
    """The key of a name's version now."""
    with versions.held(name) as key:
        return key


def settle(versions: AdapterVersions) -> None:
    """Wait until what was to be freed is."""
    versions.change(lambda: None).result(10)


def test_a_held_version_outlives_its_name() -> None:
    host, disposed = Host("a"), Disposed()
    versions = AdapterVersions(host)
    load(versions, "a", dispose=disposed.of("second"))
    settle(versions)
    assert host.keys == {"a.2"}  # nobody held the first
    with versions.held("a") as key:
        load(versions, "a")
        settle(versions)
        assert key == "a.2"
        assert key_of(versions, "a") == "a.3"
        assert host.keys == {"a.2", "a.3"}
        assert len(versions) == 2
        versions.hold(key)
    settle(versions)
    assert host.keys == {"a.2", "a.3"}
    assert disposed == []
    versions.release(key)
    settle(versions)
    assert host.keys == {"a.3"}
    assert disposed == ["second"]
    with pytest.raises(UnknownAdapterError, match=r"'a\.2' was unloaded"):
        versions.hold("a.3", "a.2")
    versions.unload("a")
    settle(versions)  # the hold that failed left no hold on the other
    assert host.keys == set()


def test_unloading_takes_the_name_at_once() -> None:
    host = Host("a", "b")
    versions = AdapterVersions(host)
    with versions.held("a"):
        versions.unload("a")
        assert versions.names == ("b",)
        for change in (lambda: versions.unload("a"), lambda: key_of(versions, "a")):
            with pytest.raises(UnknownAdapterError, match=r"no adapter 'a' is loaded; loaded is b"):
                change()
        load(versions, "a", replace=False)
        settle(versions)
        assert host.keys == {"a", "b", "a.2"}
    settle(versions)
    assert host.keys == {"b", "a.2"}


def test_a_failed_load_changes_nothing() -> None:
    host = Host("a")
    versions = AdapterVersions(host)

    def fail(_: str) -> None:
        raise ServingError("not finite")

    for name in ("a", "b"):
        with pytest.raises(ServingError, match="not finite"):
            versions.load(name, ANY, fail, replace=True, dispose=lambda: None)
    for name, message in (("a", "is loaded already; give load_inplace"), ("../a", "is not a name"), ("", "is not")):
        with pytest.raises(ServingError, match=message):
            versions.load(name, ANY, fail, replace=False, dispose=lambda: None)
    assert host.keys == {"a"}
    assert key_of(versions, "a") == "a"


def test_a_key_is_nobody_elses() -> None:
    host = Host("a", "a.2", "a.3")
    versions = AdapterVersions(host)
    load(versions, "a")
    assert key_of(versions, "a") == "a.4"
    load(versions, "b" * 128)
    assert len(key_of(versions, "b" * 128)) < 128


def test_changes_wait_up_to_a_bound() -> None:
    versions, began, go = AdapterVersions(Host()), threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        go.wait(10)

    changes = [versions.change(wait)]
    assert began.wait(10)
    changes += [versions.change(lambda: None) for _ in range(16)]
    with pytest.raises(TooManyChangesError, match="16 changes of adapters wait"):
        versions.change(lambda: None)
    go.set()
    for change in changes:
        change.result(10)
    settle(versions)


def test_closing_disposes_of_everything() -> None:
    disposed = Disposed()
    versions = AdapterVersions(Host())
    for name in ("a", "b"):
        load(versions, name, dispose=disposed.of(name))
    with versions.held("a"):
        versions.close()
    assert sorted(disposed) == ["a", "b"]
