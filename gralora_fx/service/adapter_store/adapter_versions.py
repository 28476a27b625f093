"""Versions of adapters in memory, and how many of them there is room for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gralora_fx.base.amounts import shown_size
from gralora_fx.errors import shown
from gralora_fx.run.generate.request_errors import AdapterLimitError, AdaptersInUseError
from gralora_fx.service.adapter_store.named_files import RootFile


@dataclass
class AdapterVersion:
    """An adapter as it was loaded once.

    Attributes:
        name: Its name.
        key: What the host calls it.
        size: Bytes of its tensors.
        file: What it was read from, which is looked at again when a request names it; None for one that is pinned: it
            stays until it is evicted by a request.
        holds: How many requests run with it, or are about to.
        used: When it was last asked for, as a number that grows.
        is_tried: Whether the model is known to run with it; else the first request with it tries it.
    """

    name: str
    key: str
    size: int
    file: RootFile | None = None
    holds: int = 0
    used: int = 0
    is_tried: bool = True


@dataclass(frozen=True)
class AdapterLimits:
    """How many adapters there is room for in memory, versions that requests hold included.

    Attributes:
        count: How many; None for any number.
        memory: Bytes of all of them; None for no limit.
    """

    count: int | None = None
    memory: int | None = None

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
