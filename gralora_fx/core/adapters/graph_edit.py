"""An edit of a graph by hand as a pass: it is replayed on every form of the graph, or refused by name."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from gralora_fx.base.compat.torch_graphs import tree_flatten, tree_unflatten
from gralora_fx.core.graph.same_value import same_value
from gralora_fx.core.graph.surgery import annotation_of
from gralora_fx.core.tracing.graph_record import loaded_target, saved_meta, saved_target
from gralora_fx.errors import RewriteError, listed


class _Place(str):
    """The name of a node that holds in every form of a graph."""

    __slots__ = ()

    @property
    def adapter(self) -> str | None:
        """The adapter whose node it is, or None."""
        return self.split("'")[1] if self.startswith("adapter ") else None


class _Places:
    """The nodes of one form of a graph: the base's by name, an adapter's and others by their number among their like.

    A layer's output is that of its last adapter, or of the layer itself where none is in the graph.
    """

    def __init__(self, graph: fx.Graph, known: Collection[str]) -> None:
        heads: dict[fx.Node, str] = {}
        outputs: dict[str, fx.Node] = {}
        for node in graph.nodes:
            note = annotation_of(node) or {}
            if node.name in known:
                heads[node] = f"node {node.name}"
                outputs[node.name] = node
            elif note.get("adapter"):
                heads[node] = f"adapter {note['adapter']!r} at {note['site']} ({note.get('call')})"
                if note.get("call") in outputs:
                    outputs[note["call"]] = node
            else:
                heads[node] = f"{node.op} {node.target}"
        counts, seen = Counter(heads.values()), Counter[str]()
        self.of: dict[fx.Node, _Place] = {}
        for node, head in heads.items():
            seen[head] += 1
            self.of[node] = _Place(f"{head}, {seen[head]} of {counts[head]}" if counts[head] > 1 else head)
        self.read = {**self.of, **{node: _Place(f"output {name}") for name, node in outputs.items()}}
        self.nodes = {place: node for places in (self.of, self.read) for node, place in places.items()}
        self.adapters = {place.adapter for place in self.nodes}


@dataclass(frozen=True)
class _Edited:
    """A node that was added or changed, with places instead of the nodes that it reads."""

    place: _Place
    op: str
    now: tuple[Any, ...]  # target, args and kwargs
    before: tuple[Any, ...] = ()  # the same, as they were; empty for an added node
    after: tuple[_Place, ...] = ()  # of an added one: what comes before it, the nearest first
    meta: Any = None


@dataclass(frozen=True, eq=False)
class GraphEdit:
    """A pass that does to a graph what an edit by hand did: nodes added, changed and removed."""

    edited: tuple[_Edited, ...]  # in the order of the edited graph
    removed: tuple[_Place, ...]  # from the last one
    known: frozenset[str]  # names of the base's nodes

    @property
    def label(self) -> str:
        """The edited nodes, for messages."""
        return f"adopted from the edit of {listed([*(entry.place for entry in self.edited), *self.removed], 3)}"

    @classmethod
    def between(cls, before: fx.Graph, after: fx.Graph, known: Collection[str]) -> GraphEdit:
        """Return the edit that made a graph of one whose nodes had the same names."""
        places, old = _Places(before, known), {node.name: node for node in before.nodes}

        def place(node: fx.Node) -> _Place:
            return places.read[old[node.name]] if node.name in old else _Place(f"added {node.name}")

        edited, passed = [], list[_Place]()
        for node in after.nodes:
            now, was = _computed(node, place), old.pop(node.name, None)
            then = () if was is None else _computed(was, places.read.__getitem__)
            if was is None and node.op in ("placeholder", "output"):
                raise RewriteError(f"the edit adds the {node.op} {node.name}, which changes how the model is called")
            if was is None:
                edited.append(_Edited(place(node), node.op, now, after=tuple(passed[::-1]), meta=saved_meta(node)))
            elif not same_value((node.op, now), (was.op, then)):
                edited.append(_Edited(places.of[was], node.op, now, then))
            if was is not None:
                old[node.name] = was
            passed = [*([] if was is not None and node.name in known else passed), place(node)]
        kept = {node.name for node in after.nodes}
        removed = tuple(places.of[node] for node in reversed(before.nodes) if node.name not in kept)
        return cls(tuple(edited), removed, frozenset(known))

    def __call__(self, graph_module: fx.GraphModule, elsewhere: Collection[str] = ()) -> None:
        """Replay the edit; what is at nodes of adapters that are not in the graph waits, unless they act elsewhere."""
        graph, places = graph_module.graph, _Places(graph_module.graph, self.known)
        nodes, waiting = dict(places.nodes), set[_Place]()

        def waits(place: object) -> bool:
            if not isinstance(place, _Place) or place in nodes:
                return False
            if place.adapter in elsewhere:
                raise RewriteError(f"it edits {place}, and this form of the graph computes the adapter otherwise")
            return place in waiting or (place.adapter is not None and place.adapter not in places.adapters)

        def find(place: Any) -> Any:
            if isinstance(place, _Place) and place not in nodes:
                raise RewriteError(f"it edits {place}, which is not in this form of the graph")
            return nodes[place] if isinstance(place, _Place) else place

        for entry in self.edited:
            if entry.before:
                if not waits(entry.place):
                    _change(find(entry.place), entry, find)
            elif any(map(waits, _places_in(entry.now))):
                waiting.add(entry.place)
            else:
                with graph.inserting_after(find(next(place for place in entry.after if place in nodes))):
                    target, args, kwargs = map_aggregate(entry.now, find)
                    added = graph.create_node(entry.op, target, args, kwargs, entry.place.removeprefix("added "))
                nodes[entry.place] = added
                added.meta = saved_meta(entry)
        for place in self.removed:
            if not waits(place):
                graph.erase_node(find(place))

    def __deepcopy__(self, _: Any) -> GraphEdit:
        """Return the edit itself, which has no tensors."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle, with operators by their paths."""

        def saved(entry: _Edited) -> _Edited:
            of = [values and (saved_target(entry.op, entry.place, values[0]), *values[1:]) for values in _ends(entry)]
            return dataclasses.replace(entry, now=of[0], before=of[1])

        return {**self.__dict__, "edited": tuple(map(saved, self.edited))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        def loaded(entry: _Edited) -> _Edited:
            of = [values and (loaded_target(values[0]), *values[1:]) for values in _ends(entry)]
            return dataclasses.replace(entry, now=of[0], before=of[1])

        self.__dict__.update(state, edited=tuple(map(loaded, state["edited"])))


def is_alike(one: fx.Graph, other: fx.Graph) -> bool:
    """Return whether two graphs compute the same, node for node."""

    def numbered(graph: fx.Graph) -> list[Any]:
        numbers = {node: _Place(index) for index, node in enumerate(graph.nodes)}
        return [(node.op, _computed(node, numbers.__getitem__)) for node in graph.nodes]

    return same_value(numbered(one), numbered(other))


def _ends(entry: _Edited) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return entry.now, entry.before


def _computed(node: fx.Node, place: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    """Return a node's target, args and kwargs, with places instead of nodes."""
    return node.target, fx.map_arg(node.args, place), fx.map_arg(node.kwargs, place)


def _places_in(values: Any) -> list[_Place]:
    found: list[_Place] = []
    map_aggregate(values, lambda value: found.append(value) if isinstance(value, _Place) else None)
    return found


def _change(node: fx.Node, entry: _Edited, find: Callable[[Any], Any]) -> None:
    """Give a node the values of an edit; those that the edit changed must be what they were when it was made."""
    (old, form), (new, new_form) = tree_flatten(entry.before), tree_flatten(entry.now)
    here, here_form = tree_flatten((node.target, node.args, node.kwargs))
    changed = [form != new_form or not same_value(*ends) for ends in zip(old, new, strict=form == new_form)]
    changed += [True] * (len(old) - len(changed))
    fits = form == here_form and all(
        same_value(map_aggregate(was, find), value)
        for was, value, counts in zip(old, here, changed, strict=True)
        if counts
    )
    if not fits:
        raise RewriteError(f"it edits {entry.place}, which reads or computes something else in this form of the graph")
    if form == new_form:
        kept = [map_aggregate(now, find) if c else h for now, h, c in zip(new, here, changed, strict=True)]
        values = tree_unflatten(kept, form)
    else:
        values = map_aggregate(entry.now, find)
    node.op, (node.target, node.args, node.kwargs) = entry.op, values
