"""The protocol of a graph pass: from a graph to what was changed and what was left, with the reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Graph = TypeVar("Graph")


class Skip(NamedTuple):
    """A place that a pass left unchanged, with the reason."""

    place: str
    reason: str


@dataclass(frozen=True)
class PassResult(Generic[Graph]):
    """What a pass did.

    Attributes:
        changed: How many places it changed.
        skipped: Places that it left unchanged, each with the reason.
        graph: The graph that replaces the given one; None if that was changed in place.
        summary: What it found besides, as a value of a type of its own.
    """

    changed: int
    skipped: tuple[Skip, ...] = ()
    graph: Graph | None = None
    summary: object = None


Pass = Callable[[Graph], PassResult[Graph]]  # a function, or a frozen dataclass whose fields are its options
