"""The directory that adapters may be loaded from while the service runs.

Files are copied before they are read, so that the bytes that were checked are the bytes that run.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.model_files import usable_path
from gralora_fx.errors import ConfigError, ServingError, first_line, shown, without_folder
from gralora_fx.format.adapter_format import AdapterContent
from gralora_fx.format.adapter_paths import PICKLED, SUFFIX, check_adapter_kind, is_name, pickled, record_path
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.generate.request_errors import AdapterNotFoundError
from gralora_fx.run.open_export import adapter_as_data, in_memory
from gralora_fx.run.sessions.adapter_file import AdapterInMemory

_PEFT = ("adapter_config.json", "adapter_model.safetensors")
_MOST_BYTES = 8 << 30  # maximum size of a file
Facts = tuple[int, ...]  # `stat` fields that change when a file is replaced or written


@dataclass(frozen=True)
class AdapterRoot:
    """A directory of adapters: `.onnx_adapter` files with their records, and directories that PEFT saved."""

    path: Path  # the directory, absolute and without links
    unresolved: Path  # the directory as it was named, absolute

    @classmethod
    def of(cls, directory: Path) -> AdapterRoot:
        """Return the root at a directory."""
        if os.open not in os.supports_dir_fd or not hasattr(os, "O_NOFOLLOW"):
            raise ConfigError("--adapter-root needs a system that opens files without following links, such as Linux")
        directory = usable_path(directory, ConfigError, remedy="give the directory of adapters as --adapter-root")
        try:
            path = directory.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"the adapter root {directory} cannot be read ({first_line(error)})") from error
        if not path.is_dir():
            raise ConfigError(f"the adapter root {directory} is not a directory")
        return cls(path, directory.absolute())

    def names(self) -> list[str]:
        """Return the names of the adapters directly below the root, without links that lead out of it."""
        with os.scandir(self.path) as entries:
            return [entry.name.removesuffix(SUFFIX) for entry in entries if self._is_adapter(entry)]

    def _is_adapter(self, entry: os.DirEntry[str]) -> bool:
        try:
            if entry.is_symlink() and not Path(entry.path).resolve(strict=True).is_relative_to(self.path):
                return False
            is_kind = entry.name.endswith(SUFFIX) or (entry.is_dir() and Path(entry.path, _PEFT[0]).is_file())
        except (OSError, RuntimeError):
            return False
        return is_kind and is_name(entry.name.removesuffix(SUFFIX))

    def find(self, name: str) -> str | None:
        """Return the relative path of the adapter called `name`: a file, a directory saved by PEFT, or None.

        Links are resolved later, by `copy`.
        """
        if not is_name(name):
            return None
        file = f"{name}{SUFFIX}"
        return file if os.path.lexists(self.path / file) else name if (self.path / name / _PEFT[0]).exists() else None

    def state_of(self, text: str) -> tuple[Facts | None, ...]:
        """Return `stat` facts of each file at a path, None for a missing file; for paths see `copy`."""
        path = self._within(text)
        files = [path, record_path(path)] if path.suffix == SUFFIX else [path / file for file in _PEFT]
        return tuple(map(_facts, files))

    def copy(self, text: str, name: str, onnx_dir: Path, folder: Path) -> Path:
        """Copy an adapter into an empty folder, converting one of PEFT; return its `.onnx_adapter` file there."""
        is_directory, contents = self._contents(text)
        copy = folder / Path(text).name
        _write(contents, copy if is_directory else folder)
        with without_folder(str(folder)):
            return adapter_as_data(copy, onnx_dir, copy, name)

    def source(self, text: str, name: str, onnx_dir: Path, manifest: Manifest) -> AdapterContent | AdapterInMemory:
        """Read an adapter's files once; arguments and errors are those of `copy`, plus the export's manifest."""
        is_directory, contents = self._contents(text)
        if not is_directory:
            (file, content), (_, record) = contents.items()
            return AdapterContent(Path(file), content, record.tobytes())
        with tempfile.TemporaryDirectory(prefix="gralora-fx-") as folder:
            copy = Path(folder, Path(text).name)
            _write(contents, copy)
            with without_folder(folder):
                return in_memory(copy, onnx_dir, name, manifest)

    def _contents(self, text: str) -> tuple[bool, dict[str, NDArray[np.uint8]]]:
        """Return whether the path is a directory, and the bytes of its files (or of a file and its record) by name."""
        path = self._within(text)
        try:
            is_directory = self._resolved(path, text).is_dir()
            check_adapter_kind(path, is_directory, shown(text))
            sources = [path / file for file in _PEFT] if is_directory else [path, record_path(path)]
            if is_directory and not sources[1].exists() and (path / PICKLED).exists():
                raise pickled(shown(f"{text}/{PICKLED}"))
            with ExitStack() as stack:
                files = [stack.enter_context(self._opened(source)) for source in sources]
                before = [_facts(file.fileno()) for file in files]
                contents = {
                    source.name: np.fromfile(file, np.uint8) for source, file in zip(sources, files, strict=True)
                }
                for source, facts, file in zip(sources, before, files, strict=True):
                    if facts != _facts(file.fileno()):
                        raise ServingError(f"{source.name} was changed while it was read; ask again when it is whole")
        except OSError as error:
            raise ServingError(f"{shown(text)} cannot be read ({error.strerror or first_line(error)})") from error
        return is_directory, contents

    def _within(self, text: str) -> Path:
        """Return a path below the root, checked as text only (links are not resolved)."""
        parts = PurePosixPath(text).parts
        if not text or "\0" in text or ".." in parts or not text.isprintable():
            raise ServingError(f"lora_path is {shown(text)}; give a path within the adapter root, without '..'")
        named = Path(text)
        path = self.path / (named.relative_to(self.unresolved) if named.is_relative_to(self.unresolved) else named)
        if not path.is_relative_to(self.path):
            raise ServingError(f"{shown(text)} is outside the adapter root; give a path within it")
        return path

    def _resolved(self, path: Path, text: str) -> Path:
        """Resolve a path's links; raise if it leaves the root."""
        try:
            resolved = path.resolve(strict=True)
        except FileNotFoundError as error:
            missing = "" if path == self.path / text else f" ({path.name} is missing)"
            raise AdapterNotFoundError(f"there is no adapter at {shown(text)} in the adapter root{missing}") from error
        except RuntimeError as error:
            raise ServingError(f"{shown(text)} is a loop of links") from error
        if not resolved.is_relative_to(self.path):
            raise ServingError(f"{shown(text)} is a link out of the adapter root; copy the file itself into it")
        return resolved

    @contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file of the root directory by directory with O_NOFOLLOW: links created meanwhile are not followed."""
        text = str(path.relative_to(self.path))
        parts = self._resolved(path, text).relative_to(self.path).parts
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        for index, part in enumerate(parts):
            kind = os.O_DIRECTORY if index < len(parts) - 1 else os.O_NONBLOCK  # opening a pipe would block
            try:
                inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=handle)
            finally:
                os.close(handle)
            handle = inner
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            os.close(handle)  # fdopen would leave a directory's descriptor open
            raise ServingError(f"{shown(text)} is not a regular file")
        with os.fdopen(handle, "rb") as file:
            if facts.st_nlink > 1:
                raise ServingError(
                    f"{shown(text)} is a hard link, which may lead out of the adapter root; copy the file"
                )
            if facts.st_size > _MOST_BYTES:
                raise ServingError(f"{shown(text)} has {facts.st_size:,} bytes, more than {_MOST_BYTES:,}")
            yield file


def _write(contents: Mapping[str, NDArray[np.uint8]], folder: Path) -> None:
    """Write files into a folder, which may be new."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        content.tofile(folder / name)


def _facts(file: Path | int) -> Facts | None:
    try:
        facts = os.stat(file)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
