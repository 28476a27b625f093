"""The kinds of export, and which one fits a trace; a kind is imported where it does."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from gralora_fx.core.tracing.inputs.layouts import CacheLayout
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.flavour import Flavour

_FOLDER = __name__.rpartition(".")[0]
# which traces a kind is for, by the module and the name of its flavour
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
