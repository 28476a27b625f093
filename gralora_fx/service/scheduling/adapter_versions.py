"""Versions of adapters in memory, and how many of them there is room for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Protocol

from gralora_fx.base.amounts import shown_size
from gralora_fx.errors import ServingError, shown


class UnknownModelError(ServingError):
    """A request names a model that is not served."""

    field = "model"


class UnknownAdapterError(ServingError):
    """A request names an adapter that is not there."""

    field = "lora_name"


class AdapterNameError(ServingError):
    """A name may not be given to an adapter."""

    field = "lora_name"


class TooManyChangesError(ServingError):
    """There is no room for more loads now."""


class AdapterLoadError(ServingError):
    """An adapter that a request names is there, and cannot be loaded."""

    field = "model"


class AdapterLimitError(ServingError):
    """An adapter is above a limit, or there is no room beside those that stay."""


class AdaptersInUseError(ServingError):
    """There is no room for an adapter until a request ends."""


@dataclass
class AdapterVersion:
    """An adapter as it was loaded once.

    Attributes:
        name: Its name.
        key: What the host calls it.
        size: Bytes of its tensors.
        state: What its files were like; None for one that nobody looks for on the disk again.
        is_pinned: Whether it stays until it is unloaded.
        holds: How many requests run with it, or are about to.
        is_current: Whether its name stands for it.
        used: When it was last asked for, as a number that grows.
        trial: Tries it, which the first request with it does by itself; None once it is known to run.
    """

    name: str
    key: str
    size: int = 0
    state: Hashable = None
    is_pinned: bool = True
    holds: int = 0
    is_current: bool = True
    used: int = 0
    trial: Callable[[str], None] | None = None


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
        """Whether some versions are within the limits, and one more beside them."""
        count, memory = len(versions) + (size is not None), sum(version.size for version in versions) + (size or 0)
        return (self.count is None or count <= self.count) and (self.memory is None or memory <= self.memory)

    def check(self, staying: Collection[AdapterVersion], name: str = "", size: int | None = None) -> None:
        """Check that there is room for those that stay, and for one more beside them.

        Args:
            staying: The versions that stay.
            name: The name of the one that comes.
            size: Its bytes, 0 if they are not known; None if none comes.
        """
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
        self, versions: Collection[AdapterVersion], old: AdapterVersion | None, name: str, size: int
    ) -> AdapterVersion | None:
        """The version to free for one that comes, the least recently used; None if there is room.

        Args:
            versions: Those in memory.
            old: The one that the name stands for, which goes then; None if it is new.
            name: The name of the one that comes.
            size: Its bytes, 0 if they are not known.
        """
        others = [version for version in versions if version is not old or version.holds]
        if self.allow(others, size):
            return None
        current = [version for version in others if version.is_current and version is not old]
        self.check([version for version in current if version.is_pinned], name, size)
        free = [version for version in current if not version.is_pinned and not version.holds]
        if not free:
            raise AdaptersInUseError(f"there is no room for {shown(name)}: requests run with all others; ask again")
        return min(free, key=lambda version: version.used)


class AdapterLoader(Protocol):
    """Loads adapters that are not in memory when requests name them."""

    @property
    def requests(self) -> int:
        """How many requests wait for loads."""

    @property
    def waiting(self) -> tuple[str, ...]:
        """The adapters that they wait for."""

    def names(self) -> list[str]:
        """The adapters that there are."""

    def knows(self, name: str) -> bool:
        """Whether there is an adapter of a name."""

    async def take(self, name: str, seconds: float | None) -> str:
        """The key of an adapter's version, which is held then; it is loaded if it is not there."""

    def refuse(self, version: AdapterVersion, error: ServingError) -> AdapterLoadError:
        """Take note that the model does not run with a version, and say so."""
