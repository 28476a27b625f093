"""The blocks of a model, found from module paths: its numbered layers and the branches that hold them."""

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
        items: Paths of the items directly in it.
        alike: Paths of the blocks that it represents, its own first; empty if it represents only itself.
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
        """Path of the container of the layer."""
        return self.path.rpartition(".")[0]

    def all_items(self) -> list[str]:
        """Everything in it and in the frames within it."""
        return [*self.items, *(item for block in self.blocks for item in block.all_items())]


class BlockMap:
    """Which frames a module path lies in.

    A numbered layer is the outermost module of a path that is named by a number and holds sites, such as
    `encoder.layer.0`. Within it, a second numbering makes frames only if its children are alike, as stages and experts
    are, but `layer.0` and `layer.1` of a T5 block are not. Branches are the modules at which the paths to several
    numbered containers diverge: an encoder and a decoder.
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
        """The outermost numbered layer around a module that does not contain another module."""
        layers = [above for above in ancestors(path) if above in self._layers]
        return next((layer for layer in layers if not f"{apart_from}.".startswith(f"{layer}.")), None)

    def has_frames_in(self, path: str) -> bool:
        """Whether a module is or contains a frame."""
        return any(frame == path or frame.startswith(f"{path}.") for frame in self._layers | self._branches)

    def tree(self, items: Iterable[str]) -> Block:
        """The frames as a tree, with items in the order given.

        Args:
            items: Module paths.
        """
        root = Block("")
        blocks = {"": root}
        for item in items:
            parent = root
            for frame in self.frames_of(item):
                if frame not in blocks:
                    blocks[frame] = Block(frame, is_layer=frame in self._layers)
                    parent.blocks.append(blocks[frame])
                parent = blocks[frame]
            parent.items.append(item)
        return root

    def _find_layers(self, within: str, site_paths: Collection[str]) -> None:
        """Add the outermost numbered layers below a module, then those within each."""
        layers: dict[str, list[str]] = {}
        for path in site_paths:
            if layer := _first_numbered(path, within):
                layers.setdefault(layer, []).append(path)
        for layer, paths in layers.items():
            container = layer.rpartition(".")[0]
            siblings = [
                {path.removeprefix(other) for path in others}
                for other, others in layers.items()
                if other.rpartition(".")[0] == container
            ]
            is_repeated = len(siblings) > 1 and all(names == siblings[0] for names in siblings)
            if not within or is_repeated:
                self._layers.add(layer)
                self._find_layers(layer, paths)


def _first_numbered(path: str, within: str) -> str | None:
    parts = path.split(".")
    start = len(within.split(".")) if within else 0
    for index in range(start, len(parts) - 1):  # a site itself is not a frame, whatever its name
        if parts[index].isdecimal():
            return ".".join(parts[: index + 1])
    return None


def ancestors(path: str) -> list[str]:
    """Paths of the ancestors of a module, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _branches(containers: Collection[str]) -> set[str]:
    """The modules at which the paths to the containers diverge."""
    ways = {tuple(container.split(".")) for container in containers if container}
    branches: set[str] = set()
    for way in ways:
        for length in range(1, len(way) + 1):
            siblings = {other[:length] for other in ways if other[: length - 1] == way[: length - 1]}
            if len({sibling[length - 1 : length] for sibling in siblings}) > 1:
                branches.add(".".join(way[:length]))
    return branches
