"""Versions of adapters in memory, limits on them, and the files that they are read from.

A file is either a path that the operator gave, or a path in a root, which requests may name.
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
    """An adapter given by the operator: an `.onnx_adapter` file, or a directory saved by PEFT."""

    path: Path
    onnx_dir: Path  # the export that it is for

    def read(self, name: str, manifest: Manifest) -> AdapterSource:
        """Return the file's path, or a PEFT directory's tensors converted for the export."""
        file = adapter_path(self.path)
        return in_memory(file, self.onnx_dir, name, manifest) if file.is_dir() else file


@dataclass(frozen=True)
class RootFile:
    """An adapter in a root at one moment: equal records mean unchanged files."""

    root: AdapterRoot
    path: str  # its path there, as in the request
    onnx_dir: Path  # the export that it is for
    facts: tuple[Facts | None, ...] = ()  # `stat` facts of its files; empty if the files are not watched

    def read(self, name: str, manifest: Manifest) -> AdapterSource:
        """Read the adapter with `AdapterRoot.source`."""
        return self.root.source(self.path, name, self.onnx_dir, manifest)


class RootFiles:
    """The adapters of a root by name: those directly below it, and those that requests named.

    A name that a request unloaded stays hidden until a request loads it again.
    """

    def __init__(self, root: AdapterRoot, onnx_dir: Path) -> None:
        """Start with the adapters directly below the root."""
        self._root, self.onnx_dir = root, onnx_dir
        self._paths: dict[str, str] = {}  # paths of adapters that requests named
        self._hidden: set[str] = set()

    def names(self) -> list[str]:
        """Return all known names, including those of adapters that fail to load."""
        return sorted({*self._root.names(), *self._paths} - self._hidden)

    def find(self, name: str) -> RootFile | None:
        """Find an adapter by name and read its files' facts."""
        path = None if name in self._hidden else self._paths.get(name) or self._root.find(name)
        file = None if path is None else self.at(path)
        return None if file is None or not any(file.facts) else file

    def at(self, path: str, *, looks: bool = True) -> RootFile:
        """Return a record for the adapter at a path (for paths see `AdapterRoot.copy`), whether or not it exists."""
        return RootFile(self._root, path, self.onnx_dir, self._root.state_of(path) if looks else ())

    def give_name(self, name: str, path: str | None) -> None:
        """Map a name to a path; None for an adapter that exists in memory only."""
        self._paths.pop(name, None)
        if path is not None:
            self._paths[name] = path
        self._hidden.discard(name)

    def take_name(self, name: str) -> None:
        """Hide a name until it is given again."""
        self._paths.pop(name, None)
        if self._root.find(name) is not None:
            self._hidden.add(name)


@dataclass
class AdapterVersion:
    """One loaded version of an adapter."""

    name: str
    key: str  # its name inside the model that holds adapters
    size: int  # bytes of its tensors
    # the file that it was read from, checked for changes at each request; None for a pinned adapter, which stays until
    # a request unloads it
    file: RootFile | None = None
    holds: int = 0  # number of requests that run with it, or are about to
    used: int = 0  # counter value of its last use; larger is more recent
    is_tried: bool = True  # whether the model has run with it; if not, its first request is the trial


@dataclass(frozen=True)
class AdapterLimits:
    """Limits on adapters in memory; versions held by requests count too."""

    count: int | None = None  # maximum number; None for no limit
    memory: int | None = None  # maximum bytes of all of them; None for no limit

    def allow(self, versions: Collection[AdapterVersion], size: int | None = None) -> bool:
        """Return whether versions fit the limits, with one more of `size` bytes unless it is None."""
        count, memory = len(versions) + (size is not None), sum(version.size for version in versions) + (size or 0)
        return (self.count is None or count <= self.count) and (self.memory is None or memory <= self.memory)

    def check(self, staying: Collection[AdapterVersion], name: str = "", size: int | None = None) -> None:
        """Raise an `AdapterLimitError` if one more version of this name and size does not fit beside `staying`."""
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
        """Return the least recently used version to free for a new one; None if there is room.

        Of the served versions (`serving`), the one of `name` goes once the new one is there.
        """
        if self.allow([version for version in versions if version is not serving.get(name) or version.holds], size):
            return None
        others = [version for other, version in serving.items() if other != name]
        self.check([version for version in others if version.file is None], name, size)
        free = [version for version in others if version.file is not None and not version.holds]
        if not free:
            raise AdaptersInUseError(f"there is no room for {shown(name)}: requests run with all others; ask again")
        return min(free, key=lambda version: version.used)
