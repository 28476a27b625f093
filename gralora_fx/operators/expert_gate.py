"""What an expert computes between its two products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
    "identity": lambda x: x,
}
NO_GATE, HALVES, INTERLEAVED = "none", "halves", "interleaved"  # how the outputs of a first product hold gates


@dataclass(frozen=True)
class ExpertGate:
    """What an expert computes between its two products: of a gate `g` and a linear part `l`, or of `g` alone.

    `act(min(g, limit)) * (clamp(l, -limit, limit) + offset)`, where `silu` is `g * sigmoid(alpha * g)`.

    Attributes:
        activation: One of `ACTIVATIONS`.
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

    def __call__(self, x: Tensor) -> Tensor:
        """The second product's input, `[..., width]`, of the first one's output."""
        if self.layout == NO_GATE:
            return self._activated(x)
        gate, linear = x.chunk(2, dim=-1) if self.layout == HALVES else (x[..., ::2], x[..., 1::2])
        if self.limit:
            gate, linear = gate.clamp(max=self.limit), linear.clamp(-self.limit, self.limit)
        return self._activated(gate) * (linear + self.offset if self.offset else linear)

    def _activated(self, x: Tensor) -> Tensor:
        if self.activation == "silu" and self.alpha != 1:
            return x * torch.sigmoid(x * self.alpha)
        return ACTIVATIONS[self.activation](x)
