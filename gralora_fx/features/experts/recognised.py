"""Recognition of models with experts: by transformers' interface, or by a known loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gralora_fx.core.tracing.known_code import Recognised

LOOPS = (
    Recognised("dbrx.modeling_dbrx:DbrxExperts.forward", "interface:dbrx", ending="DbrxExperts", folder=__package__),
    Recognised(
        "longcat_flash.modeling_longcat_flash:LongcatFlashExperts.forward",
        "interface:longcat",
        ending="FlashExperts",
        fits=lambda experts: experts.num_routed_experts > 0,
        folder=__package__,
    ),
)


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has experts, by transformers' interface or in a known loop of its own."""
    return any(
        hasattr(part, "_apply_gate") or any(code.replaces_in(part) for code in LOOPS) for part in model.modules()
    )


@contextmanager
def as_operators(model: nn.Module) -> Iterator[None]:
    """Trace a model's experts, if any, as one node per layer while the block runs."""
    if not has_experts(model):
        yield
        return
    from gralora_fx.features.experts.interface import experts_as_operators, looped_experts_as_operators

    with experts_as_operators(model), looped_experts_as_operators(model, LOOPS):
        yield
