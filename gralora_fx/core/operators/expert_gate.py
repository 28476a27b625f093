"""What an expert computes between its two products, as a record that needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

NO_GATE, HALVES, INTERLEAVED = "none", "halves", "interleaved"  # how the outputs of a first product hold gates
GATE_NOTE = "gralora_gate"  # key in the metadata of an exported operator: `<activation> <layout>` of its gate


@dataclass(frozen=True)
class ExpertGate:
    """What an expert computes between its two products: of a gate `g` and a linear part `l`, or of `g` alone.

    `act(min(g, limit)) * (clamp(l, -limit, limit) + offset)`, where `silu` is `g * sigmoid(alpha * g)`. The fields are
    arguments of the operator `experts`, of the same names.

    Attributes:
        activation: One of `operators.experts.ACTIVATIONS`.
        layout: Where gates are among the first product's outputs: in the first half (`"halves"`), at even places
            (`"interleaved"`), or everywhere, so that nothing is multiplied (`"none"`).
        alpha: Factor within `silu`'s sigmoid.
        offset: What is added to the linear part.
        limit: Bound of the gate from above, and of the linear part on both sides; 0 for none.
    """

    activation: str
    layout: str
    alpha: float = 1.0
    offset: float = 0.0
    limit: float = 0.0
