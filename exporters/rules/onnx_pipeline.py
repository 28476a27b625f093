"""Pipelines over an ONNX model, and the log of an export's passes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from gralora_fx.base.sources.model_files import usable_directory
from gralora_fx.core.graph.pipeline import PassLog, PassResult, Pipeline
from gralora_fx.errors import ExportError, GraloraError, first_line

DUMP = "GRALORA_FX_DUMP"  # environment variable: the directory that graphs are written to

# facts of `torch.fx` graphs that passes need, leave and end
UNSHARED_WRITES = "no tensor that is written into shares memory"
FUNCTIONAL = "no operator writes into its arguments"
SIMPLIFIED = "nodes that compute nothing are gone"
NOTED_VALUES = "every node has its traced value"
ONE_SPELLING = "each expression is computed once"

# facts of ONNX models
FLOAT_MATRICES = "constant matrices are of floats"
OWN_WEIGHTS = "layers read weights of their own"
APART_ADDITIONS = "residual additions are apart from normalizations"
ROTARY_NODES = "rotary embeddings are a node each"
FOLDED_TRANSPOSES = "weights that are read transposed are stored so"
FUSED_ATTENTION = "attention without a cache is a node a layer"
FUSED_CACHED_ATTENTION = "attention over a cache is a node a layer"
TRANSLATED = frozenset({FLOAT_MATRICES, OWN_WEIGHTS, APART_ADDITIONS, ROTARY_NODES})  # of a model as it was translated


@dataclass(frozen=True)
class OnnxIrPass:
    """A pass of the `onnx_ir` library, adapted to this pipeline."""

    wrapped: InPlacePass

    @property
    def name(self) -> str:
        """The class's own name."""
        return type(self.wrapped).__name__

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Run it; the library reports only whether anything changed."""
        return PassResult(int(self.wrapped(model).modified))


@dataclass(frozen=True)
class OnnxPipeline(Pipeline[ir.Model]):
    """A pipeline after which the model imports the domains of its operators."""

    given: frozenset[str] = TRANSLATED
    error: type[GraloraError] = ExportError

    def run(self, graph: ir.Model, log: PassLog | None = None) -> ir.Model:
        """Run every pass and lint its result (see `Pipeline.run`)."""
        graph = super().run(graph, log)
        import_domains(graph)
        return graph

    def problems(self, graph: ir.Model) -> Iterator[str]:
        """List nodes that read values which no earlier node defines."""
        earlier: set[ir.Node] = set()
        for node in graph.graph:
            for value in node.inputs:
                source = None if value is None else value.producer()
                if source is not None and source not in earlier:
                    yield f"{node.name} reads {value.name if value else ''}"
            earlier.add(node)


def export_log(dump: str | Path | None) -> PassLog:
    """Return a log that dumps graphs to the given directory, or to the one that the environment names."""
    directory = (os.environ.get(DUMP) or None) if dump is None else dump
    if directory is None:
        return PassLog()
    path = usable_directory(directory, ExportError, remedy="give a directory to write graphs to")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"graphs cannot be written to {path} ({first_line(error)})") from error
    return PassLog(path)


def import_domains(model: ir.Model) -> None:
    """Set the model's opset imports to the domains of its operators; in place."""
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    used |= {function.domain for function in model.functions.values()}
    imports = model.graph.opset_imports
    for domain in [domain for domain in imports if domain and domain not in used]:
        del imports[domain]
    for domain in sorted(used):
        imports.setdefault(domain, 1)
