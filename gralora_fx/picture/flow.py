"""Data flow between the sites of a graph, without the nodes in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import fx, nn

from gralora_fx.core.graph.linear_calls import readers, tensor_at
from gralora_fx.core.graph.module_tree import is_within, module_stack
from gralora_fx.picture.blocks import BlockMap
from gralora_fx.picture.facts import ModelFacts

_SHAPES = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, getattr}


class Item(NamedTuple):
    """An item to draw: a site, another part with parameters, an input, or the output."""

    kind: Literal["site", "part", "input", "output"]
    path: str


@dataclass(frozen=True)
class Flow:
    """Condensed data flow."""

    items: tuple[Item, ...]  # everything drawn, in the order in which it first computes
    # Pairs between which a value passes without another drawn item in between. Pairs that are also joined by a longer
    # path, such as those of a residual connection, are left out; a pair against the order of `items` is a layer called
    # again.
    edges: tuple[tuple[Item, Item], ...]


def condense(facts: ModelFacts, blocks: BlockMap) -> Flow:
    """Condense the graph to the items that are drawn.

    Before: `q = linear(x, wq); k = linear(x, wk); a = sdpa(q, k, v); o = linear(a, wo)`
    After:  `q -> o, k -> o`
    """
    owners = _Owners(facts, blocks)
    events: list[Item] = []  # every computation of an item; bits of the masks below index these
    nearest: dict[fx.Node, int] = {}  # the last events that a node's value comes from
    earlier: list[int] = []  # by event: all events before it
    edges: dict[tuple[Item, Item], None] = {}
    for node in facts.traced.graph_module.graph.nodes:
        sources = 0
        if node.op != "get_attr" and not _is_shape(node):
            for source in node.all_input_nodes:
                sources |= nearest[source]
        for item in owners.items_of(node):
            before = 0
            for event in _bits_downwards(sources):
                if not before >> event & 1:  # otherwise a longer path leads there
                    edges.setdefault((events[event], item))
                    before |= earlier[event] | 1 << event
            sources = 1 << len(events)
            events.append(item)
            earlier.append(before)
        nearest[node] = sources
    uncalled = [Item("site", path) for path in facts.sites]
    uncalled += [Item("part", path) for path in facts.trained_whole if not owners.holds_sites(path)]
    joined = tuple((a, b) for a, b in edges if a != b)
    used = {item for edge in joined for item in edge}
    items = dict.fromkeys(item for item in [*events, *uncalled] if item in used or item.kind in ("site", "part"))
    return Flow(tuple(items), joined)


class _Owners:
    """Maps nodes to the items that they belong to."""

    def __init__(self, facts: ModelFacts, blocks: BlockMap) -> None:
        self._tree, self._blocks = facts.traced.tree, blocks
        self._graph_module = facts.traced.graph_module
        self._site_paths, self._whole = set(facts.sites), list(facts.trained_whole)
        self._calls: dict[str, list[str]] = {}
        nodes = {node.name: node for node in self._graph_module.graph.nodes}
        for path, entry in facts.sites.items():
            names = entry.site.calls
            if entry.site.kind == "parameter":  # its calls read it
                names = tuple(reader.name for name in names for reader in readers(nodes[name]))
            for name in names:
                self._calls.setdefault(name, []).append(path)

    def items_of(self, node: fx.Node) -> list[Item]:
        """Return the items that a node computes, in order: several for stacked matrices, multiplied by one node."""
        if node.op == "placeholder":
            return [Item("input", str(node.target))] if node.users else []
        if node.op == "output":
            return [Item("output", "output")]
        if node.name in self._calls:
            return [Item("site", path) for path in self._calls[node.name]]
        path = self._owner_of_parameters(node)
        part = None if path is None else self._part(path)
        return [] if part is None else [part]

    def holds_sites(self, path: str) -> bool:
        """Return whether a module is or contains a site."""
        return any(is_within(site, path) for site in self._site_paths)

    def _owner_of_parameters(self, node: fx.Node) -> str | None:
        """Return the module whose parameters a node applies to a value."""
        if node.op == "call_module":
            module = self._graph_module.get_submodule(str(node.target))
            return str(node.target) if any(True for _ in module.parameters()) else None
        attributes = [source for source in node.all_input_nodes if source.op == "get_attr"]
        if len(attributes) == len(node.all_input_nodes):
            return None
        names = [str(source.target) for source in attributes]
        parameters = [name for name in names if isinstance(tensor_at(self._graph_module, name), nn.Parameter)]
        if not parameters:
            return None
        stack = [path for path, _ in module_stack(node)]
        return self._tree.canonical(stack[-1]) if stack else parameters[0].rpartition(".")[0]

    def _part(self, path: str) -> Item | None:
        """Return the largest module around a path that holds neither sites nor layers."""
        if self.holds_sites(path):
            return None
        for module in self._whole:
            if is_within(path, module):
                return Item("part", module)
        if not path or self._blocks.layer_of(path) is not None:
            return None
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            above = ".".join(parts[:length])
            if not self.holds_sites(above) and not self._blocks.has_frames_in(above):
                return Item("part", above)
        return None


def _is_shape(node: fx.Node) -> bool:
    """Return whether a node only reads a size, which is not data flow."""
    return node.target in _SHAPES if node.op == "call_function" else node.op == "call_method" and node.target == "size"


def _bits_downwards(mask: int) -> Iterator[int]:
    """Yield positions of the set bits, highest first."""
    while mask:
        bit = mask.bit_length() - 1
        yield bit
        mask ^= 1 << bit
