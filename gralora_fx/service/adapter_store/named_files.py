"""Where adapters are read from: a path that the operator gives, or a root, in which requests name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gralora_fx.format.adapter_paths import adapter_path
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.open_export import in_memory
from gralora_fx.run.sessions.adapter_file import AdapterSource
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot, Facts


@dataclass(frozen=True)
class GivenFile:
    """An adapter anywhere: an `.onnx_adapter` file, or a directory that PEFT saved.

    Attributes:
        path: Its path.
        onnx_dir: The export that it is for.
    """

    path: Path
    onnx_dir: Path

    def read(self, name: str, manifest: Manifest) -> AdapterSource:
        """Return the file, or what the directory holds as data of the export."""
        file = adapter_path(self.path)
        return in_memory(file, self.onnx_dir, name, manifest) if file.is_dir() else file


@dataclass(frozen=True)
class RootFile:
    """An adapter in a root, as its files are at a time: equal ones hold the same.

    Attributes:
        root: The root.
        path: Its path there, as a request gives it.
        onnx_dir: The export that it is for.
        facts: What its files are like; empty where they are not looked at again.
    """

    root: AdapterRoot
    path: str
    onnx_dir: Path
    facts: tuple[Facts | None, ...] = ()

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
