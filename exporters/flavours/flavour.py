"""What a kind of export is: which traces it is for, how they become ONNX models, what else it writes and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import fx

from gralora_fx.exporters.adapters_as_data import DataSites
from gralora_fx.exporters.onnx_passes.row_tokens import RowsError
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.graph.pipeline import PassLog, PassResult, Skip
from gralora_fx.runtime.export_directory import MODEL, ROWS, ROWS_NAME
from gralora_fx.runtime.manifest import RowsEntry
from gralora_fx.tracing.traced_model import TracedModel

Models = Mapping[str, ir.Model]  # by the names of their files, without a suffix


def with_rows(model: ir.Model, rows: Callable[[PassLog], ir.Model], log: PassLog) -> Models:
    """A model and its graph for rows of a batch that differ, over the same weights, if there can be one.

    Args:
        model: `model.onnx`.
        rows: Makes `model_rows.onnx`, given a log of its passes; it raises `RowsError` where there can be none.
        log: Gets a `RowsEntry`, which has the reason where there is none, besides the reports of passes.
    """
    models = {MODEL: model}
    apart = PassLog(log.dump, log.reports)  # counts are those of one graph
    try:
        models[ROWS] = rows(apart)
        entry = RowsEntry(ROWS_NAME)
    except RowsError as error:
        entry = RowsEntry(None, str(error))
    note_rows(entry, models.get(ROWS, model), log)
    return models


def note_rows(entry: RowsEntry, model: ir.Model, log: PassLog) -> None:
    """Report whether there is a graph for rows that differ, or why there is none.

    Args:
        entry: The file, or the reason.
        model: What was converted.
        log: Gets the report.
    """
    left = () if entry.reason is None else (Skip(ROWS_NAME, entry.reason),)
    log.add("rows", "graph_of_rows", PassResult(1 - len(left), left, summary=entry), model)


@dataclass(frozen=True)
class Request:
    """An export request.

    Attributes:
        traced: The trace, with adapters folded.
        graph_module: A copy of its graph in evaluation mode, every node with its traced value (`meta["val"]`).
        options: The options of the export.
        log: Receives a report for each pass.
        data: The layers whose adapters are data of the models; None for none.
    """

    traced: TracedModel
    graph_module: fx.GraphModule
    options: ExportOptions
    log: PassLog
    data: DataSites | None = None


def _write_nothing(directory: Path, traced: TracedModel, models: Models) -> None:
    """Write nothing: most flavours consist of their models alone."""


@dataclass(frozen=True)
class Flavour:
    """A kind of export.

    Attributes:
        name: What it is called.
        fits: Whether the flavour fits a trace.
        convert: Makes the ONNX models, by pipelines of passes.
        verification: What is compared with the model.
        write_files: Writes what other programs read beside the models.
        has_last_logits: Whether it can return the last position's logits alone.
        shares_weights: Whether its models have their weights in one file.
    """

    name: str
    fits: Callable[[TracedModel], bool]
    convert: Callable[[Request], Models]
    verification: Verification
    write_files: Callable[[Path, TracedModel, Models], None] = _write_nothing
    has_last_logits: bool = False
    shares_weights: bool = False

    def logits(self, options: ExportOptions) -> str:
        """Which positions' logits an export gives: `"last"` or `"all"`."""
        return options.logits if self.has_last_logits else "all"
