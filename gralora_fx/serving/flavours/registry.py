"""The reading halves, by the name that a manifest has."""

from __future__ import annotations

from pathlib import Path

from gralora_fx.errors import ServingError, listed
from gralora_fx.serving.flavours.decoder import DECODER
from gralora_fx.serving.flavours.encoder_decoder import ENCODER_DECODER
from gralora_fx.serving.flavours.plain import PLAIN
from gralora_fx.serving.flavours.reading import Reading

READINGS = {reading.name: reading for reading in (PLAIN, DECODER, ENCODER_DECODER)}


def reading_of(name: str, directory: Path) -> Reading:
    """The reading half of a kind of export.

    Args:
        name: The kind.
        directory: The export directory, for the message.

    Raises:
        ServingError: There is none.
    """
    if name not in READINGS:
        raise ServingError(
            f"{directory} is an export of the kind {name!r:.80}, and this version reads {listed(READINGS)}; update "
            "gralora-fx, or add the kind to gralora_fx.serving.flavours"
        )
    return READINGS[name]
