"""Folding of runs of equal layers into one that represents all of them."""

from __future__ import annotations

import re
from collections.abc import Hashable
from itertools import groupby

from gralora_fx.picture.blocks import Block, ancestors
from gralora_fx.picture.facts import ModelFacts, SiteAdapter
from gralora_fx.picture.flow import Flow

SHORTEST_RUN = 3  # two layers are drawn faster than explained


class Folding:
    """Blocks with runs folded, and the mapping from layers that are not drawn to those that represent them."""

    def __init__(self, root: Block, facts: ModelFacts, flow: Flow, *, full: bool) -> None:
        """Fold a tree of blocks in place.

        Layers are equal if they hold the same sites, with the same shapes, adapters, reasons and inner edges. The norms
        of their updates do not count: a strip in the box of a folded site shows the update of every layer.

        Args:
            root: The blocks.
            facts: The model.
            flow: Its data flow.
            full: Whether to fold nothing.
        """
        self._facts, self._flow = facts, flow
        self._stands_for: dict[str, str] = {}
        self._alike: dict[str, list[str]] | None = None
        if not full:
            self._fold(root)
        self._representatives = set(self._stands_for.values())

    def drawn(self, path: str) -> str:
        """The path of the module that is drawn for a module."""
        for block in ancestors(path):
            if block in self._stands_for:
                return self.drawn(self._stands_for[block] + path[len(block) :])
        return path

    def alike(self, path: str) -> tuple[str, ...]:
        """Paths of the sites that the box of a site represents, its own included, in the order of the modules."""
        if self._alike is None:
            self._alike = {}
            for other in self._facts.sites:
                self._alike.setdefault(self.drawn(other), []).append(other)
        return tuple(self._alike.get(path, [path]))

    def joins_folded_layers(self, tail: str, head: str) -> bool:
        """Whether an edge leads from one layer of a folded run to another of it."""
        tails, heads = self._layers_of(tail), self._layers_of(head)
        return any(tails[layer] != heads[layer] for layer in tails.keys() & heads.keys())

    def _layers_of(self, path: str) -> dict[str, str]:
        """The layers around a module, by the layer that is drawn for each."""
        pairs = {self._stands_for.get(above, above): above for above in ancestors(path)}
        return {drawn: above for drawn, above in pairs.items() if drawn in self._representatives}

    def _fold(self, block: Block) -> None:
        for inner in block.blocks:
            self._fold(inner)
        folded: list[Block] = []
        for _, group in groupby(block.blocks, key=self._signature):
            run = list(group)
            if run[0].is_layer and len(run) >= SHORTEST_RUN:
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
            (a.path.removeprefix(within), b.path.removeprefix(within))
            for a, b in self._flow.edges
            if a.path.startswith(within) and b.path.startswith(within)
        )
        inner = tuple(self._signature(other) for other in block.blocks)
        names = tuple(other.path.removeprefix(within) for other in block.blocks)
        items = tuple((path.removeprefix(within), self._look(path, block.index)) for path in block.items)
        return block.container, items, names, inner, edges

    def _look(self, path: str, index: int) -> Hashable:
        """Everything that the box of an item shows, except for the number of its layer."""
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
