"""Passes over a graph and pipelines of them: what each needs and leaves, changed and skipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import fx

from gralora_fx.base.progress.stages import counted
from gralora_fx.errors import GraloraError, RewriteError, first_line

Graph = TypeVar("Graph")
Summary = TypeVar("Summary")
_Declared = TypeVar("_Declared", bound=Callable[..., object])


class Skip(NamedTuple):
    """A place that a pass left unchanged, with the reason."""

    place: str
    reason: str


@dataclass(frozen=True)
class PassResult(Generic[Graph]):
    """The result of a pass."""

    changed: int  # how many places it changed
    skipped: tuple[Skip, ...] = ()  # places that it left unchanged, each with the reason
    graph: Graph | None = None  # the graph that replaces the given one; None if that was changed in place
    summary: object = None  # other findings, as a value of a type of their own


Pass = Callable[[Graph], PassResult[Graph]]  # a function, or a frozen dataclass whose fields are its options


@dataclass(frozen=True)
class Contract:
    """Facts that a pass needs, establishes and ends; each is a short phrase."""

    needs: frozenset[str] = frozenset()  # facts that the pass relies on
    leaves: frozenset[str] = frozenset()  # facts that it establishes
    ends: frozenset[str] = frozenset()  # facts that no longer hold after it


def contract(
    *, needs: Collection[str] = (), leaves: Collection[str] = (), ends: Collection[str] = ()
) -> Callable[[_Declared], _Declared]:
    """Declare the contract of a pass, a function or a class; a pass without one may stand anywhere."""

    def declare(graph_pass: _Declared) -> _Declared:
        attributes: Any = graph_pass
        attributes.contract = Contract(frozenset(needs), frozenset(leaves), frozenset(ends))
        return graph_pass

    return declare


@dataclass(frozen=True)
class PassReport:
    """The report of one pass of a pipeline."""

    pipeline: str  # the pipeline it belongs to
    name: str
    changed: int  # how many places it changed
    skipped: tuple[Skip, ...] = ()  # places that it left unchanged, each with the reason

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, as in `gralora_export.json`."""
        skipped = {"skipped": [skip._asdict() for skip in self.skipped]} if self.skipped else {}
        return {"pipeline": self.pipeline, "name": self.name, "changed": self.changed, **skipped}


@dataclass
class PassLog:
    """The reports of passes, in order."""

    dump: Path | None = None  # the directory to which the graph is written after each pass, or None
    reports: list[PassReport] = field(default_factory=list)  # a report for each pass that ran
    _summaries: list[object] = field(default_factory=list, init=False, repr=False)

    def add(self, pipeline: str, name: str, result: PassResult[Any], graph: object) -> None:
        """Record the result of a pass, and dump its graph if `dump` is set."""
        self.reports.append(PassReport(pipeline, name, result.changed, result.skipped))
        self._summaries.append(result.summary)
        if self.dump is not None:
            path = self.dump / f"{len(self.reports):02d}-{pipeline}-{name}.txt"
            path.write_text(f"{graph}\n", encoding="utf-8")

    def summaries(self, kind: type[Summary]) -> list[Summary]:
        """Return the summaries of one type that passes returned, in order."""
        return [summary for summary in self._summaries if isinstance(summary, kind)]


@dataclass(frozen=True)
class Pipeline(Generic[Graph]):
    """An ordered sequence of passes, each of which searches the graph when its turn comes."""

    name: str  # its name in reports
    passes: tuple[Pass[Graph], ...]
    given: frozenset[str] = frozenset()  # facts that hold of every graph that it gets
    error: type[GraloraError] = RewriteError  # the error raised for a failing pass

    def __post_init__(self) -> None:
        holding, ended_by = set(self.given), dict[str, str]()
        for graph_pass in self.passes:
            name, declared = name_of(graph_pass), getattr(graph_pass, "contract", Contract())
            for fact in sorted(declared.needs - holding):
                why = f"the pass {ended_by[fact]} ends" if fact in ended_by else "no pass before it leaves"
                raise ValueError(f"the pass {name} of {self.name} needs {fact!r}, which {why}; change their order")
            holding = (holding - declared.ends) | declared.leaves
            ended_by |= dict.fromkeys(declared.ends, name)

    def run(self, graph: Graph, log: PassLog | None = None) -> Graph:
        """Run every pass and lint its result: each node may read only earlier ones."""
        for graph_pass in counted(self.passes, "changing the graph", "passes"):
            name = name_of(graph_pass)
            try:
                result = graph_pass(graph)
            except GraloraError:
                raise
            except Exception as error:  # any error of a library that the pass uses
                raise self.error(f"the pass {name} of {self.name} failed: {first_line(error)}") from error
            graph = graph if result.graph is None else result.graph
            for problem in self.problems(graph):
                raise self.error(f"the pass {name} of {self.name} left a graph that does not lint: {problem}")
            if log is not None:
                log.add(self.name, name, result, graph)
        return graph

    def problems(self, graph: Graph) -> Iterator[str]:
        """Describe nodes that read values which no earlier node defines."""
        assert isinstance(graph, fx.Graph)
        seen: set[fx.Node] = set()
        for node in graph.nodes:
            yield from (f"{node} reads {source}" for source in node.all_input_nodes if source not in seen)
            seen.add(node)


def name_of(graph_pass: object) -> str:
    """Return the name of a pass in snake case, from its function or class."""
    name = getattr(graph_pass, "name", None) or getattr(graph_pass, "__name__", None) or type(graph_pass).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower()


GraphPass = Callable[[fx.GraphModule], Any]  # a user's pass
