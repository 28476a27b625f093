"""A decoder with a cache: its rows run together in `model_rows.onnx`, or one after the other in `model.onnx`."""

from __future__ import annotations

from functools import partial

from gralora_fx.engine.limits import DecoderLimits
from gralora_fx.engine.rows_decoder import RowsDecoder
from gralora_fx.engine.sequential_decoder import SequentialDecoder, takes_buffers
from gralora_fx.runtime.export_directory import DECODER_KIND, MODEL_NAME
from gralora_fx.serving.flavours.reading import OpenExport, Reading
from gralora_fx.serving.generation import Generation


def _generation(export: OpenExport) -> Generation:
    limits = DecoderLimits.of(export.directory, export.config, export.manifest.position_offset)
    given = (export.session, export.adapters, limits)
    if export.has_rows:
        return Generation(limits, partial(RowsDecoder, *given))
    is_buffer = takes_buffers(export.directory / MODEL_NAME)
    return Generation(limits, partial(SequentialDecoder, *given, takes_buffers=is_buffer))


# other providers lack the operators of rows
DECODER = Reading(DECODER_KIND, lambda is_on_cpu, by_row: is_on_cpu, calls_rows=False, generation=_generation)
