"""An encoder-decoder with a cache: a row is opened with what the encoder reads, and rows run one after the other."""

from __future__ import annotations

from functools import partial

from gralora_fx.engine.encoder_decoder import EncoderDecoder
from gralora_fx.engine.encodings import Encodings
from gralora_fx.engine.limits import DecoderLimits
from gralora_fx.runtime.export_directory import ENCODER_DECODER_KIND
from gralora_fx.serving.encoder_inputs import EncoderInputs
from gralora_fx.serving.flavours.reading import OpenExport, Reading
from gralora_fx.serving.generation import Generation


def _generation(export: OpenExport) -> Generation:
    offset = export.manifest.position_offset
    limits = DecoderLimits.of(export.directory, export.config, offset)
    inputs = EncoderInputs(export.directory, export.config, export.session, limits, offset)
    return Generation(limits, partial(EncoderDecoder, export.session, export.adapters, limits, Encodings()), inputs)


ENCODER_DECODER = Reading(
    ENCODER_DECODER_KIND, lambda is_on_cpu, by_row: False, calls_rows=False, generation=_generation
)
