"""What a kind of export is: which traces it is for, how they become ONNX models, and what else it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import fx

from gralora_fx.exporters.pipeline import PassLog
from gralora_fx.exporters.reports import AttentionReport
from gralora_fx.tracing.traced_model import TracedModel


@dataclass(frozen=True)
class Request:
    """What is to be exported.

    Attributes:
        traced: The trace, adapters folded.
        graph_module: A copy of its graph in evaluation mode, every node with the value that tracing noted.
        precision: Precision of weights, activations and the cache.
        logits: Whether the last position's logits are given or all, where a flavour knows the difference.
        log: Gets a report for each pass.
    """

    traced: TracedModel
    graph_module: fx.GraphModule
    precision: str
    logits: str
    log: PassLog


@dataclass(frozen=True)
class Exported:
    """What a flavour made.

    Attributes:
        models: ONNX models by the names of their files, without a suffix.
        attention: Which layers' attention is fused, of a decoder.
    """

    models: Mapping[str, ir.Model]
    attention: AttentionReport | None = None


def _write_nothing(directory: Path, traced: TracedModel, models: Mapping[str, ir.Model]) -> None:
    """Most flavours write models alone."""


@dataclass(frozen=True)
class Flavour:
    """A kind of export.

    Attributes:
        name: What it is called.
        fits: Whether a trace is of this kind.
        convert: Makes the ONNX models.
        write_files: Writes what other programs read beside them.
        has_last_logits: Whether it can give the last position's logits alone.
    """

    name: str
    fits: Callable[[TracedModel], bool]
    convert: Callable[[Request], Exported]
    write_files: Callable[[Path, TracedModel, Mapping[str, ir.Model]], None] = _write_nothing
    has_last_logits: bool = False
