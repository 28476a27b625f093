"""Versions of adapters in memory, how many of them there is room for, and where they are read from.

That is a path that the operator gives, or a root, in which requests name them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gralora_fx.base.amounts import shown_size
from gralora_fx.errors import shown
from gralora_fx.format.adapter_paths import adapter_path
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.generate.request_errors import AdapterLimitError, AdaptersInUseError
from gralora_fx.run.open_export import in_memory
from gralora_fx.run.sessions.adapter_file import AdapterSource
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot, Facts


@dataclass(frozen=True)
class GivenFile:
    """An adapter anywhere: an `.onnx_adapter` file, or a directory that PEFT saved."""

    path: Path
    onnx_dir: Path  # the export that it is for

    def read(self, name: str, manifest: Manifest) -> AdapterSource:
        """Return the file, or what the directory holds as data of the export."""
        file = adapter_path(self.path)
        return in_memory(file, self.onnx_dir, name, manifest) if file.is_dir() else file


@dataclass(frozen=True)
class RootFile:
    """An adapter in a root, as its files are at a time: equal ones hold the same."""

    root: AdapterRoot
    path: str  # its path there, as a request gives it
    onnx_dir: Path  # the export that it is for
    facts: tuple[Facts | None, ...] = ()  # what its files are like; empty where they are not looked at again

    def read(self, name: str, manifest: Manifest) -> AdapterSource:
        """Read it, as of `AdapterRoot.source`."""
        return self.root.source(self.path, name, self.onnx_dir, manifest)


class RootFiles:
    """The adapters of a root by name: those right below it, and those that requests named.

    A name that a request took away is not found until a request gives it again.

    Attributes:
        onnx_dir: The export that they are for.
    """

    def __init__(self, root: AdapterRoot, onnx_dir: Path) -> None:
        """Begin with the adapters right below the root."""
        self._root, self.onnx_dir = root, onnx_dir
        self._paths: dict[str, str] = {}  # of those that requests named
        self._hidden: set[str] = set()

    def names(self) -> list[str]:
        """The adapters that there are, whether they can be loaded or not."""
        return sorted({*self._root.names(), *self._paths} - self._hidden)

    def find(self, name: str) -> RootFile | None:
        """Find an adapter by its name, and look at its files."""
        path = None if name in self._hidden else self._paths.get(name) or self._root.find(name)
        file = None if path is None else self.at(path)
        return None if file is None or not any(file.facts) else file

    def at(self, path: str, *, looks: bool = True) -> RootFile:
        """Return the adapter at a path (as of `AdapterRoot.copy`), where there may be none, with facts of its files."""
        return RootFile(self._root, path, self.onnx_dir, self._root.state_of(path) if looks else ())

    def give_name(self, name: str, path: str | None) -> None:
        """Let a name stand for what is at a path; None for what is in memory alone."""
        self._paths.pop(name, None)
        if path is not None:
            self._paths[name] = path
        self._hidden.discard(name)

    def take_name(self, name: str) -> None:
        """Take a name away."""
        self._paths.pop(name, None)
        if self._root.find(name) is not None:
            self._hidden.add(name)


@dataclass
class AdapterVersion:
    """An adapter as it was loaded once."""

    name: str
    key: str  # what the host calls it
    size: int  # bytes of its tensors
    # what it was read from, which is looked at again when a request names it; None for one that is pinned: it stays
    # until it is evicted by a request
    file: RootFile | None = None
    holds: int = 0  # how many requests run with it, or are about to
    used: int = 0  # when it was last asked for, as a number that grows
    is_tried: bool = True  # whether the model is known to run with it; else the first request with it tries it


@dataclass(frozen=True)
class AdapterLimits:
    """How many adapters there is room for in memory, versions that requests hold included."""

    count: int | None = None  # how many; None for any number
    memory: int | None = None  # bytes of all of them; None for no limit

    def allow(self, versions: Collection[AdapterVersion], size: int | None = None) -> bool:
        """Return whether versions are within the limits, with one more of `size` bytes unless that is None."""
        count, memory = len(versions) + (size is not None), sum(version.size for version in versions) + (size or 0)
        return (self.count is None or count <= self.count) and (self.memory is None or memory <= self.memory)

    def check(self, staying: Collection[AdapterVersion], name: str = "", size: int | None = None) -> None:
        """Raise an `AdapterLimitError` unless there is room beside versions for one more of a name and size."""
        if self.allow(staying, size):
            return
        taken = sum(version.size for version in staying)
        what = f"there is no room for {shown(name)}{f' of {shown_size(size)}' if size else ''}: " if name else ""
        if self.count is not None and len(staying) + (size is not None) > self.count:
            limit, option = f"max_adapters is {self.count}", "--max-adapters"
        else:
            limit, option = f"max_adapter_memory is {shown_size(self.memory or 0)}", "--max-adapter-memory"
        stay = f"{len(staying)} adapters of {shown_size(taken)} stay in memory"
        raise AdapterLimitError(f"{what}{limit}, and {stay}; raise {option}, or have fewer that stay")

    def victim(
        self, versions: Collection[AdapterVersion], serving: Mapping[str, AdapterVersion], name: str, size: int
    ) -> AdapterVersion | None:
        """Choose the version to free for a new one of a name and size, the least recently used; None if there is room.

        Of the versions that names stand for (`serving`), the one of `name` goes once the new one is there.
        """
        if self.allow([version for version in versions if version is not serving.get(name) or version.holds], size):
            return None
        others = [version for other, version in serving.items() if other != name]
        self.check([version for version in others if version.file is None], name, size)
        free = [version for version in others if version.file is not None and not version.holds]
        if not free:
            raise AdaptersInUseError(f"there is no room for {shown(name)}: requests run with all others; ask again")
        return min(free, key=lambda version: version.used)
