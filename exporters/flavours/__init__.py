"""Export flavours: models without a cache, decoders with one, encoder-decoders; and which one fits a trace."""

from __future__ import annotations

from gralora_fx.exporters.flavours.decoder import DECODER
from gralora_fx.exporters.flavours.encoder_decoder import ENCODER_DECODER
from gralora_fx.exporters.flavours.flavour import Flavour
from gralora_fx.exporters.flavours.plain import PLAIN
from gralora_fx.tracing.traced_model import TracedModel

FLAVOURS = (
    ENCODER_DECODER,
    DECODER,
    PLAIN,  # last: it fits any trace
)


def flavour_of(traced: TracedModel) -> Flavour:
    """The first flavour that fits a trace."""
    return next(flavour for flavour in FLAVOURS if flavour.fits(traced))
