"""Blocks of a model, from module paths: numbered layers and the branches around them; runs of equal ones are folded."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from gralora_fx.core.graph.module_tree import is_within
from gralora_fx.picture.facts import ModelFacts, SiteAdapter

_SHORTEST_RUN = 3  # two layers are drawn faster than explained


@dataclass
class Block:
    """A frame of the picture."""

    path: str  # module path; the root is `""`
    is_layer: bool = False  # whether it is a numbered layer, rather than a branch such as an encoder
    blocks: list[Block] = field(default_factory=list)  # the frames within it, in order
    items: list[str] = field(default_factory=list)  # paths of the items directly in it
    # paths of the blocks that it represents, its own first; empty if it represents only itself
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
        """Return all items in it and in nested frames."""
        return [*self.items, *(item for block in self.blocks for item in block.all_items())]


class BlockMap:
    """Maps module paths to frames.

    A numbered layer is the outermost module of a path that is named by a number and holds sites, such as
    `encoder.layer.0`. Within it, a second numbering makes frames only if its children are alike, as stages and
    parallel layers are, but `layer.0` and `layer.1` of a T5 block are not. Branches are the modules at which the paths
    to several numbered containers diverge: an encoder and a decoder.
    """

    def __init__(self, site_paths: Collection[str]) -> None:
        self._layers: set[str] = set()
        self._find_layers("", site_paths)
        outermost = {path for path in self._layers if not any(above in self._layers for above in ancestors(path))}
        self._branches = _branches({path.rpartition(".")[0] for path in outermost})

    def frames_of(self, path: str) -> list[str]:
        """Return paths of the frames around a module, outermost first."""
        return [above for above in ancestors(path) if above in self._layers or above in self._branches]

    def layer_of(self, path: str, *, apart_from: str = "") -> str | None:
        """Return the outermost numbered layer around `path` that does not contain `apart_from`."""
        layers = [above for above in ancestors(path) if above in self._layers]
        return next((layer for layer in layers if not is_within(apart_from, layer)), None)

    def has_frames_in(self, path: str) -> bool:
        """Return whether a module is or contains a frame."""
        return any(is_within(frame, path) for frame in self._layers | self._branches)

    def tree(self, items: Iterable[str]) -> Block:
        """Return the frames as a tree, with items in the given order."""
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
    """Return paths of a module's ancestors, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _branches(containers: Collection[str]) -> set[str]:
    """Return the modules at which the paths to the containers diverge."""
    ways = {tuple(container.split(".")) for container in containers if container}
    branches: set[str] = set()
    for way in ways:
        for length in range(1, len(way) + 1):
            siblings = {other[:length] for other in ways if other[: length - 1] == way[: length - 1]}
            if len({sibling[length - 1 : length] for sibling in siblings}) > 1:
                branches.add(".".join(way[:length]))
    return branches


class Folding:
    """Blocks with folded runs, and the mapping from hidden layers to the ones that represent them."""

    def __init__(self, root: Block, facts: ModelFacts, edges: Sequence[tuple[str, str]], *, full: bool) -> None:
        """Fold a tree of blocks in place.

        Layers are equal if they hold the same sites, with the same shapes, adapters, reasons and inner edges. Norms of
        updates may differ: a strip in the box of a folded site shows every layer's.
        """
        self._facts, self._edges = facts, edges
        self._stands_for: dict[str, str] = {}
        self._alike: dict[str, list[str]] | None = None
        if not full:
            self._fold(root)
        self._representatives = set(self._stands_for.values())

    def drawn(self, path: str) -> str:
        """Return the path of the module drawn in place of `path`."""
        for block in ancestors(path):
            if block in self._stands_for:
                return self.drawn(self._stands_for[block] + path[len(block) :])
        return path

    def alike(self, path: str) -> tuple[str, ...]:
        """Return paths of the sites that a site's box represents, itself included, in module order."""
        if self._alike is None:
            self._alike = {}
            for other in self._facts.sites:
                self._alike.setdefault(self.drawn(other), []).append(other)
        return tuple(self._alike.get(path, [path]))

    def joins_folded_layers(self, tail: str, head: str) -> bool:
        """Return whether an edge connects two layers of one folded run."""
        tails, heads = self._layers_of(tail), self._layers_of(head)
        return any(tails[layer] != heads[layer] for layer in tails.keys() & heads.keys())

    def _layers_of(self, path: str) -> dict[str, str]:
        """Return the layers around a module, by the layer drawn for each."""
        pairs = {self._stands_for.get(above, above): above for above in ancestors(path)}
        return {drawn: above for drawn, above in pairs.items() if drawn in self._representatives}

    def _fold(self, block: Block) -> None:
        for inner in block.blocks:
            self._fold(inner)
        folded: list[Block] = []
        for _, group in groupby(block.blocks, key=self._signature):
            run = list(group)
            if run[0].is_layer and len(run) >= _SHORTEST_RUN:
                run[0].alike = tuple(layer.path for layer in run)
                self._stands_for |= {layer.path: run[0].path for layer in run[1:]}
                run = run[:1]
            folded += run
        block.blocks = folded

    def _signature(self, block: Block) -> Hashable:
        if not block.is_layer:
            return block.path
        within = f"{block.path}."
        edges = frozenset(
            (tail.removeprefix(within), head.removeprefix(within))
            for tail, head in self._edges
            if tail.startswith(within) and head.startswith(within)
        )
        inner = tuple(self._signature(other) for other in block.blocks)
        names = tuple(other.path.removeprefix(within) for other in block.blocks)
        items = tuple((path.removeprefix(within), self._look(path, block.index)) for path in block.items)
        return block.container, items, names, inner, edges

    def _look(self, path: str, index: int) -> Hashable:
        """Return everything that an item's box shows, except its layer's number."""
        entry = self._facts.sites.get(path)
        if entry is None:
            return self._facts.trained_whole.get(path)
        site = entry.site
        return (
            (site.kind, site.in_features, site.out_features, site.tied_with, entry.calls),
            (entry.status, entry.saved_by, entry.notes, re.sub(rf"\b{index}\b", "N", entry.reason)),
            tuple(_adapter_look(adapter) for adapter in entry.adapters),
        )


def _adapter_look(adapter: SiteAdapter) -> Hashable:
    return adapter.name, adapter.state, adapter.sizes, adapter.scale, adapter.norms is None
