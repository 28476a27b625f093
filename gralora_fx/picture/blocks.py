"""The blocks of a model: its numbered layers, and the branches that hold them, found from module paths."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field


@dataclass
class Block:
    """A frame of the picture.

    Attributes:
        path: Module path; the root is `""`.
        is_layer: Whether it is a numbered layer, rather than a branch such as an encoder.
        blocks: The frames within it, in order.
        items: What stands directly in it, by path.
        alike: Paths of the blocks that it stands for, its own first; empty where it stands for itself alone.
    """

    path: str
    is_layer: bool = False
    blocks: list[Block] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    alike: tuple[str, ...] = ()

    @property
    def index(self) -> int:
        """Number of a layer."""
        return int(self.path.rpartition(".")[2])

    @property
    def container(self) -> str:
        """Path of what numbers the layer."""
        return self.path.rpartition(".")[0]

    def all_items(self) -> list[str]:
        """Everything in it and in the frames within it."""
        return [*self.items, *(item for block in self.blocks for item in block.all_items())]


class BlockMap:
    """Which frames a module path lies in.

    A numbered layer is the outermost module of a path that a number names and that holds sites, such as
    `encoder.layer.0`; within it a second numbering makes frames only where its children are alike, as stages and
    experts are, and `layer.0`, `layer.1` of a T5 block are not. Branches are the modules where the ways to several
    numbered containers part: an encoder and a decoder.
    """

    def __init__(self, site_paths: Collection[str]) -> None:
        """Find the blocks of a model.

        Args:
            site_paths: Paths of its linear sites.
        """
        self._layers: set[str] = set()
        self._find_layers("", site_paths)
        outermost = {path for path in self._layers if not any(above in self._layers for above in ancestors(path))}
        self._branches = _branches({path.rpartition(".")[0] for path in outermost})

    def frames_of(self, path: str) -> list[str]:
        """Paths of the frames around a module, outermost first."""
        return [above for above in ancestors(path) if above in self._layers or above in self._branches]

    def layer_of(self, path: str, *, apart_from: str = "") -> str | None:
        """The outermost numbered layer around a module that another module is not in."""
        layers = [above for above in ancestors(path) if above in self._layers]
        return next((layer for layer in layers if not f"{apart_from}.".startswith(f"{layer}.")), None)

    def has_frames_in(self, path: str) -> bool:
        """Whether a module is a frame, or holds one."""
        return any(frame == path or frame.startswith(f"{path}.") for frame in self._layers | self._branches)

    def tree(self, items: Iterable[str]) -> Block:
        """The frames as a tree, with items in the order given.

        Args:
            items: Module paths.
        """
        root = Block("")
        known = {"": root}
        for item in items:
            parent = root
            for frame in self.frames_of(item):
                if frame not in known:
                    known[frame] = Block(frame, is_layer=frame in self._layers)
                    parent.blocks.append(known[frame])
                parent = known[frame]
            parent.items.append(item)
        return root

    def _find_layers(self, within: str, site_paths: Collection[str]) -> None:
        """Add the outermost numbered layers below a module, then those within each."""
        found: dict[str, list[str]] = {}
        for path in site_paths:
            if layer := _first_numbered(path, within):
                found.setdefault(layer, []).append(path)
        for layer, paths in found.items():
            container = layer.rpartition(".")[0]
            siblings = [
                {path.removeprefix(other) for path in others}
                for other, others in found.items()
                if other.rpartition(".")[0] == container
            ]
            is_repeated = len(siblings) > 1 and all(names == siblings[0] for names in siblings)
            if not within or is_repeated:
                self._layers.add(layer)
                self._find_layers(layer, paths)


def _first_numbered(path: str, within: str) -> str | None:
    parts = path.split(".")
    start = len(within.split(".")) if within else 0
    for place in range(start, len(parts) - 1):  # a site itself is no frame, whatever its name
        if parts[place].isdecimal():
            return ".".join(parts[: place + 1])
    return None


def ancestors(path: str) -> list[str]:
    """Paths of the modules around a module, outermost first, without itself."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _branches(containers: Collection[str]) -> set[str]:
    """The modules at which the ways to the containers part."""
    ways = {tuple(container.split(".")) for container in containers if container}
    found: set[str] = set()
    for way in ways:
        for length in range(1, len(way) + 1):
            siblings = {other[:length] for other in ways if other[: length - 1] == way[: length - 1]}
            if len({sibling[length - 1 : length] for sibling in siblings}) > 1:
                found.add(".".join(way[:length]))
    return found
