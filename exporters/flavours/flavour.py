"""What a kind of export is: which traces it is for, how they become ONNX models, what else it writes and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import fx

from gralora_fx.exporters.adapters_as_data import DataSites
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.pipeline import PassLog
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.tracing.traced_model import TracedModel

Models = Mapping[str, ir.Model]  # by the names of their files, without a suffix


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
    """

    name: str
    fits: Callable[[TracedModel], bool]
    convert: Callable[[Request], Models]
    verification: Verification
    write_files: Callable[[Path, TracedModel, Models], None] = _write_nothing
    has_last_logits: bool = False

    def logits(self, options: ExportOptions) -> str:
        """Which positions' logits an export gives: `"last"` or `"all"`."""
        return options.logits if self.has_last_logits else "all"
