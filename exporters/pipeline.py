"""Passes and pipelines: each pass is named, its result linted, counted and, on request, dumped."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass
from torch import fx

from gralora_fx.errors import ExportError, GraloraError, first_line
from gralora_fx.exporters.reports import PassReport
from gralora_fx.graph.graph_pass import Pass as Pass
from gralora_fx.graph.graph_pass import PassResult as PassResult
from gralora_fx.sources.paths import usable_directory

DUMP = "GRALORA_FX_DUMP"  # environment variable: the directory that graphs are written to

Graph = TypeVar("Graph", fx.Graph, ir.Model)
Summary = TypeVar("Summary")


@dataclass(frozen=True)
class OnnxIrPass:
    """A pass of the `onnx_ir` library as one of ours."""

    wrapped: InPlacePass

    @property
    def name(self) -> str:
        """The class's own name."""
        return type(self.wrapped).__name__

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Run it; the library reports only whether anything changed."""
        return PassResult(int(self.wrapped(model).modified))


@dataclass
class PassLog:
    """What the passes of an export did, in order.

    Attributes:
        dump: The directory to which the graph is written after each pass, or None.
        reports: A report for each pass that ran.
    """

    dump: Path | None = None
    reports: list[PassReport] = field(default_factory=list)
    _summaries: list[object] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def asked_for(cls, dump: str | Path | None) -> PassLog:
        """A log that dumps graphs to the given directory, or to the one that the environment names.

        Raises:
            ExportError: The directory cannot be created.
        """
        directory = (os.environ.get(DUMP) or None) if dump is None else dump
        if directory is None:
            return cls()
        path = usable_directory(directory, ExportError, remedy="give a directory to write graphs to")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"graphs cannot be written to {path} ({first_line(error)})") from error
        return cls(path)

    def add(self, pipeline: str, name: str, result: PassResult[Any], graph: fx.Graph | ir.Model) -> None:
        """Record the result of a pass, and dump its graph if asked to."""
        self.reports.append(PassReport(pipeline, name, result.changed, result.skipped))
        self._summaries.append(result.summary)
        if self.dump is not None:
            path = self.dump / f"{len(self.reports):02d}-{pipeline}-{name}.txt"
            path.write_text(f"{graph}\n", encoding="utf-8")

    def summaries(self, kind: type[Summary]) -> list[Summary]:
        """What passes found besides, of a type, in order."""
        return [summary for summary in self._summaries if isinstance(summary, kind)]


@dataclass(frozen=True)
class Pipeline(Generic[Graph]):
    """An ordered sequence of passes.

    Attributes:
        name: Its name in reports.
        passes: The passes.
    """

    name: str
    passes: tuple[Pass[Graph], ...]

    def run(self, graph: Graph, log: PassLog) -> Graph:
        """Run every pass and lint its result: each node may read only what comes before it.

        Args:
            graph: The graph; it may be changed in place.
            log: Receives a report for each pass.

        Returns:
            The graph after the last pass.

        Raises:
            ExportError: A pass failed, or left a graph that does not lint; the message names it.
        """
        for graph_pass in self.passes:
            name = name_of(graph_pass)
            try:
                result = graph_pass(graph)
            except GraloraError:
                raise
            except Exception as error:  # of whatever library the pass uses
                raise ExportError(f"the pass {name} of {self.name} failed: {first_line(error)}") from error
            graph = graph if result.graph is None else result.graph
            for problem in _problems(graph):
                raise ExportError(f"the pass {name} of {self.name} left a graph that does not lint: {problem}")
            log.add(self.name, name, result, graph)
        if isinstance(graph, ir.Model):
            import_domains(graph)
        return graph


def import_domains(model: ir.Model) -> None:
    """Set the model's opset imports to the domains of its operators; in place."""
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    imports = model.graph.opset_imports
    for domain in [domain for domain in imports if domain and domain not in used]:
        del imports[domain]
    for domain in sorted(used):
        imports.setdefault(domain, 1)


def name_of(graph_pass: Any) -> str:
    """The name of a pass in snake case: that of its function or class."""
    name = getattr(graph_pass, "name", None) or getattr(graph_pass, "__name__", None) or type(graph_pass).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower()


def _problems(graph: fx.Graph | ir.Model) -> Iterator[str]:
    """Nodes that read values which no earlier node defines."""
    if isinstance(graph, fx.Graph):
        seen: set[fx.Node] = set()
        for node in graph.nodes:
            yield from (f"{node} reads {source}" for source in node.all_input_nodes if source not in seen)
            seen.add(node)
        return
    earlier: set[ir.Node] = set()
    for node in graph.graph:
        for value in node.inputs:
            source = None if value is None else value.producer()
            if source is not None and source not in earlier:
                yield f"{node.name} reads {value.name if value else ''}"
        earlier.add(node)
