"""The graphs of recent states, kept so that a change back to one of them builds none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from gralora_fx.adapters.state import GraphState, Running

_MOST = 32  # graphs; each has its own nodes and code, over shared tensors


class GraphCache:
    """Graphs by state, the least recently used ones dropped.

    A graph with merged weights has memory of its own, and one with a user's pass may come out otherwise the next time.
    Such a graph is kept only for its other mode, and for the end of a block in which adapters are disabled.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._graphs: OrderedDict[Hashable, Running] = OrderedDict()

    def get(self, state: GraphState) -> Running | None:
        """The graph of a state, whether or not it is still valid; None if it is not kept."""
        return self._graphs.get((state.identity, state.training))

    def put(self, running: Running, suspended: GraphState | None) -> None:
        """Keep a graph that runs now, and drop what is no longer of use.

        Args:
            running: The graph.
            suspended: The state that a block with disabled adapters will return to, or None outside of one.
        """
        state = running.state
        self._graphs[state.identity, state.training] = running
        self._graphs.move_to_end((state.identity, state.training))
        current = {kept.identity for kept in (state, suspended) if kept is not None}
        for key, other in list(self._graphs.items()):
            if not other.state.is_repeatable and other.state.identity not in current:
                del self._graphs[key]
        if len(self._graphs) > _MOST:
            self._graphs.popitem(last=False)

    def clear(self) -> None:
        """Drop every graph, after something changed that all of them were built from."""
        self._graphs.clear()
