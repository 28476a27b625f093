"""A kind of export: how traces become ONNX models, which files it writes and compares; and which kind fits a trace.

Passes that several kinds share are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import onnx_ir as ir
from torch import fx

from gralora_fx.base.features import parts
from gralora_fx.core.graph.pipeline import Pass, PassLog, PassResult, Skip
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, option, warn_caller
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.rules.rows.row_tokens import RowsError
from gralora_fx.exporters.verify.cases import Verification
from gralora_fx.format.export_directory import MODEL, ROWS, ROWS_NAME
from gralora_fx.format.manifest import RowsEntry

Models = Mapping[str, ir.Model]  # models by the names of their files, without a suffix


def marking_passes(conversion: Conversion) -> tuple[Pass[ir.Model], ...]:
    """Return the passes that mark outputs of layers whose adapters are data; they run first, on original names."""
    adapters = conversion.adapters
    if adapters is None:
        return ()
    from gralora_fx.exporters.rules.adapters.site_marks import MarkSites

    return (MarkSites(adapters.weights, adapters.norm_biases),)


def insertion_passes(conversion: Conversion) -> tuple[Pass[ir.Model], ...]:
    """Return the passes that insert adapters as data; they run after all fusions and before quantization."""
    adapters = conversion.adapters
    if adapters is None:
        return ()
    from gralora_fx.exporters.rules.adapters.insert_adapters import InsertAdapters

    return (InsertAdapters(adapters.inputs, conversion.options.quantize is not None),)


def lowering_passes(conversion: Conversion) -> tuple[Pass[ir.Model], ...]:
    """Return the passes that lower the operators of features, if the trace has any."""
    operators = conversion.traced.operators
    return (*parts("mixing passes", operators), *parts("lowering passes", operators))


def noting_passes(conversion: Conversion) -> tuple[Pass[fx.Graph], ...]:
    """Return the passes that report layers without a feature's operator, if the trace has layers of that kind."""
    return tuple(parts("noting passes", conversion.traced.operators))


def storing_passes(conversion: Conversion, tables: frozenset[str] = frozenset()) -> tuple[Pass[ir.Model], ...]:
    """Return the passes that store matrices as planned; they run last, since all others expect floats."""
    passes: tuple[Pass[ir.Model], ...] = ()
    if conversion.plan is not None:
        from gralora_fx.exporters.rules.products.quantize_weights import QuantizeWeights

        quantizers = tuple(parts("quantized weights", conversion.traced.operators))
        passes += (QuantizeWeights(conversion.plan, tables, quantizers),)
    return (*passes, *parts("storing passes", conversion.traced.operators))


def with_rows(model: ir.Model, conversion: Conversion, rows: Callable[[Conversion], ir.Model]) -> Models:
    """Return a model and, if possible, its graph for rows that differ, over the same weights."""
    models, log = {MODEL: model}, conversion.log
    apart = PassLog(log.dump, log.reports)  # its counts are those of one graph
    try:
        models[ROWS] = rows(conversion.by_row(apart))
        entry = RowsEntry(ROWS_NAME)
    except RowsError as error:
        entry = RowsEntry(None, str(error))
    note_rows(entry, models.get(ROWS, model), log)
    return models


def note_rows(entry: RowsEntry, model: ir.Model, log: PassLog) -> None:
    """Report whether there is a graph for rows that differ, or why there is none."""
    left = () if entry.reason is None else (Skip(ROWS_NAME, entry.reason),)
    log.add("rows", "graph_of_rows", PassResult(1 - len(left), left, summary=entry), model)


def _write_nothing(directory: Path, traced: TracedModel, models: Models) -> None:
    """Write nothing: most kinds consist of their models alone."""


@dataclass(frozen=True)
class Flavour:
    """A kind of export."""

    name: str  # its name in messages
    convert: Callable[[Conversion], Models]  # makes the ONNX models, by pipelines of passes
    verification: Verification  # the comparison with the model
    # writes the files that other programs read beside the models
    write_files: Callable[[Path, TracedModel, Models], None] = _write_nothing
    has_last_logits: bool = False  # whether it can return the last position's logits alone
    takes_texts: bool = True  # whether the effect of quantization can be measured on texts
    shares_weights: bool = False  # whether its models have their weights in one file
    has_companions: bool = False  # whether companions of the graph are exported with it

    def logits(self, options: ExportOptions) -> str:
        """Return which positions' logits an export gives: `"last"` or `"all"`."""
        return options.logits if self.has_last_logits else "all"

    def check(self, options: ExportOptions) -> None:
        """Check that an export of the kind can have the options."""
        if options.logits == "all" and not self.has_last_logits:
            warn_caller(
                f"{option(logits='all')} is for a decoder with a cache; this model returns all that its forward does, "
                "so leave it out"
            )
        if options.texts is not None and not self.takes_texts:
            raise ExportError(
                f"{option(texts=...)} is for decoders and models without a cache, and the task is an "
                "encoder-decoder's with one; leave it out"
            )


_FOLDER = __name__.rpartition(".")[0]
# tests whether a trace is of a kind, by the module and name of its flavour
FLAVOURS: dict[str, Callable[[TracedModel], bool]] = {
    f"{_FOLDER}.encoder_decoder:ENCODER_DECODER": lambda traced: traced.cache_layout is CacheLayout.ENCODER_DECODER,
    f"{_FOLDER}.decoder:DECODER": lambda traced: traced.cache_layout is CacheLayout.DECODER,
    f"{_FOLDER}.plain:PLAIN": lambda traced: True,  # last: it fits any trace
}


def flavour_of(traced: TracedModel) -> Flavour:
    """Return the first flavour that fits a trace."""
    module, _, name = next(place for place, fits in FLAVOURS.items() if fits(traced)).partition(":")
    flavour: Flavour = getattr(import_module(module), name)
    return flavour
