"""Adapters that requests load in several replicas: in all or none, and in those that come later."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_served_models import settle, store, used

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.request_errors import AdapterNotFoundError, UnknownAdapterError
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot
from gralora_fx.service.adapter_store.adapter_versions import RootFiles
from gralora_fx.service.scale.spread_adapters import ReplicaAdapters, SharedAdapters, SpreadChanges, UnevenReplicasError


class Replica:
    """A replica with keys instead of adapters."""

    def __init__(self, root: AdapterRoot, folder: Path) -> None:
        self.models, self.host = store("own")
        self.models.files = self.files = RootFiles(root, folder)
        self.models.pending.most = 8
        self.trial: Any = self.models.trial
        self.adapters = ReplicaAdapters(self.models, folder)


class Handle:
    """Stands for Ray's handle of replicas."""

    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.ended: Exception | None = None

    def broadcast(self, method: str, step: str, *arguments: object) -> Any:
        assert method == "change"

        async def results(*, return_exceptions: bool) -> list[Any]:
            assert return_exceptions
            found = [await getattr(replica.adapters, step)(*arguments) for replica in self.replicas]
            return found + ([] if self.ended is None else [self.ended])

        return SimpleNamespace(results_async=results)


class Spread:
    """Two replicas, a root with two adapters, and what changes them."""

    def __init__(self, folder: Path) -> None:
        for name in ("root", "shared"):
            (folder / name).mkdir()
        for name in ("a", "b"):
            (folder / "root" / f"{name}.onnx_adapter").write_text(name)
            (folder / "root" / f"{name}.json").write_text("{}")
        self.root, self.folder, self.handle = AdapterRoot.of(folder / "root"), folder / "shared", Handle()
        self.handle.replicas = [self.replica(), self.replica()]
        self.changes = SpreadChanges(self.handle, self.root, folder, self.folder)

    def replica(self) -> Replica:
        return Replica(self.root, self.folder)

    def load(self, name: str, path: str, *, may_replace: bool = False, pin: bool = True) -> None:
        asyncio.run(self.changes.load(name, path, may_replace=may_replace, pin=pin))

    def loaded(self) -> set[tuple[str, ...]]:
        for replica in self.handle.replicas:
            settle(replica.models)
            assert len(replica.host.keys) == len(replica.models.adapters)
        return {replica.models.adapters for replica in self.handle.replicas}


@pytest.fixture
def spread(tmp_path: Path) -> Iterator[Spread]:
    made = Spread(tmp_path)
    yield made
    for replica in made.handle.replicas:
        replica.models.close()


def test_what_is_loaded_is_everywhere_and_later_too(spread: Spread) -> None:
    spread.load("x", "a.onnx_adapter")
    spread.load("y", "b.onnx_adapter")
    assert spread.loaded() == {("own", "x", "y")}
    spread.load("x", "b.onnx_adapter", may_replace=True)
    asyncio.run(spread.changes.evict("own"))
    asyncio.run(spread.changes.evict("y"))
    spread.handle.replicas.append(spread.replica())  # which has started, or again
    asyncio.run(spread.handle.replicas[-1].adapters.follow())
    assert spread.loaded() == {("x",)}
    files = list(spread.folder.rglob("*.onnx_adapter"))
    assert [path.read_text() for path in files] == ["b"]  # those that nobody loads any more are gone
    with pytest.raises(UnknownAdapterError, match="no adapter 'y' is loaded; loaded is x"):
        asyncio.run(spread.changes.evict("y"))


def test_what_is_not_pinned_is_everywhere_too_until_its_room_is_needed(spread: Spread) -> None:
    spread.load("x", "a.onnx_adapter", pin=False)
    assert spread.loaded() == {("own", "x")}
    late = spread.replica()  # which loads it when a request names it
    asyncio.run(late.adapters.follow())
    for replica in (*spread.handle.replicas, late):
        (name,) = {*replica.files.names()} - {"a", "b"}
        file = replica.files.find(name)
        assert file is not None
        assert file.path == "a.onnx_adapter"
    assert asyncio.run(used(late.models, "x")) == "x.2"
    assert late.models.adapters == ("own", "x")
    late.models.close()
    spread.load("x", "b.onnx_adapter", may_replace=True)  # and from now on pinned
    asyncio.run(spread.changes.evict("x"))
    assert spread.loaded() == {("own",)}
    assert not any("x" in replica.files.names() for replica in spread.handle.replicas)


def test_a_load_that_one_replica_refuses_is_undone(spread: Spread) -> None:
    spread.load("x", "a.onnx_adapter")
    before = SharedAdapters.read(spread.folder)
    keys = [set(replica.host.keys) for replica in spread.handle.replicas]
    spread.handle.replicas[1].trial.problem = ServingError("not finite")
    for name in ("x", "z"):
        with pytest.raises(ServingError, match="not finite"):
            spread.load(name, "b.onnx_adapter", may_replace=True)
    spread.handle.replicas[1].trial.problem = None
    spread.handle.ended = RuntimeError("the actor died")
    with pytest.raises(UnevenReplicasError, match=r"nothing was changed \(the actor died\); try again"):
        spread.load("z", "b.onnx_adapter")
    with pytest.raises(AdapterNotFoundError):
        spread.load("z", "missing.onnx_adapter")
    assert spread.loaded() == {("own", "x")}
    assert [replica.host.keys for replica in spread.handle.replicas] == keys
    assert SharedAdapters.read(spread.folder) == before
    spread.handle.ended = None
    spread.load("z", "b.onnx_adapter")
    assert spread.loaded() == {("own", "x", "z")}


def test_a_replica_that_did_not_hear_of_a_change_reads_the_record(spread: Spread) -> None:
    late = spread.handle.replicas.pop()
    spread.load("x", "a.onnx_adapter")
    asyncio.run(spread.changes.evict("own"))
    asyncio.run(late.adapters.follow())
    spread.handle.replicas.append(late)
    assert spread.loaded() == {("x",)}
