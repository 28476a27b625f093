"""The kinds of export, and which one fits a trace."""

from __future__ import annotations

from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.decoder import DECODER
from gralora_fx.exporters.kinds.encoder_decoder import ENCODER_DECODER
from gralora_fx.exporters.kinds.flavour import Flavour
from gralora_fx.exporters.kinds.plain import PLAIN

FLAVOURS = (
    ENCODER_DECODER,
    DECODER,
    PLAIN,  # last: it fits any trace
)


def flavour_of(traced: TracedModel) -> Flavour:
    """The first flavour that fits a trace."""
    return next(flavour for flavour in FLAVOURS if flavour.fits(traced))
