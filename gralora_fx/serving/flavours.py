"""How each kind of export is opened and generates: the reading halves of `gralora_fx.exporters.flavours`."""

from __future__ import annotations

from functools import partial

from gralora_fx.engine.encoder_decoder import EncoderDecoder, Encodings
from gralora_fx.engine.limits import DecoderLimits
from gralora_fx.engine.rows_decoder import RowsDecoder
from gralora_fx.engine.sequential_decoder import SequentialDecoder, takes_buffers
from gralora_fx.errors import ServingError
from gralora_fx.runtime.export_directory import DECODER_KIND, ENCODER_DECODER_KIND, MODEL_NAME, PLAIN_KIND
from gralora_fx.serving.encoder_inputs import EncoderInputs
from gralora_fx.serving.generation import Generation
from gralora_fx.serving.open_export import OpenExport, Reading


def _no_generation(export: OpenExport) -> Generation:
    """A model without a cache has one run a call."""
    raise ServingError(
        f"this export (task {export.manifest.task!r}) has no cache, so it cannot generate; "
        "export the model for a task with one, such as text-generation-with-past"
    )


def _decoder_generation(export: OpenExport) -> Generation:
    """A decoder's rows run together in `model_rows.onnx`, or one after the other in `model.onnx`."""
    limits = _limits(export)
    if export.first_is_rows:
        return Generation(limits, partial(RowsDecoder, export.first_session, export.adapters, limits))
    is_buffer = takes_buffers(export.directory / MODEL_NAME)
    return Generation(
        limits, partial(SequentialDecoder, export.first_session, export.adapters, limits, takes_buffers=is_buffer)
    )


def _encoder_decoder_generation(export: OpenExport) -> Generation:
    """A row of an encoder-decoder is opened with what the encoder reads, and rows run one after the other."""
    limits, session = _limits(export), export.first_session
    inputs = EncoderInputs(export.directory, export.config, session, limits, export.manifest.position_offset)
    make = partial(EncoderDecoder, session, export.adapters, limits, encodings=Encodings())
    return Generation(limits, make, inputs)


def _limits(export: OpenExport) -> DecoderLimits:
    return DecoderLimits.of(export.directory, export.config, export.manifest.position_offset)


READINGS = {
    reading.name: reading
    for reading in (
        Reading(PLAIN_KIND, lambda is_on_cpu, by_row: by_row, calls_rows=True, generation=_no_generation),
        # other providers lack the operators of rows
        Reading(DECODER_KIND, lambda is_on_cpu, by_row: is_on_cpu, calls_rows=False, generation=_decoder_generation),
        Reading(
            ENCODER_DECODER_KIND,
            lambda is_on_cpu, by_row: False,
            calls_rows=False,
            generation=_encoder_decoder_generation,
        ),
    )
}
