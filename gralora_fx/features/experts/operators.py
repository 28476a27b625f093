"""The operator of a mixture's experts: one node per layer, in which each token passes the experts chosen for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gralora_fx.base.compat.transformers_models import grouped_product
from gralora_fx.core.operators.call import Call, V, operator
from gralora_fx.features.experts.gate import HALVES, NO_GATE, ExpertGate, activated, gated


class GateTensors:
    """Gates computed with PyTorch (see `Arithmetic`)."""

    def number(self, value: float) -> float:
        """Return the number itself."""
        return value

    def minimum(self, x: Tensor, high: float) -> Tensor:
        """Return the tensor, bounded from above."""
        return x.clamp(max=high)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """Return the tensor, bounded on both sides."""
        return x.clamp(low, high)

    def add(self, x: Tensor, number: float) -> Tensor:
        """Return the sum."""
        return x + number

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the product."""
        return x * y

    def relu(self, x: Tensor) -> Tensor:
        """Return the positive part."""
        return nn.functional.relu(x)

    def silu(self, x: Tensor, alpha: float) -> Tensor:
        """Return `x * sigmoid(alpha * x)`."""
        return nn.functional.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """Return GELU."""
        return nn.functional.gelu(x, approximate=approximate)


def between(gate: ExpertGate, x: Tensor) -> Tensor:
    """Return the second product's input `[..., width]` from the first product's output `[..., outputs]`."""
    if gate.layout == NO_GATE:
        return activated(GateTensors(), gate, x)
    part, linear = x.chunk(2, dim=-1) if gate.layout == HALVES else (x[..., ::2], x[..., 1::2])
    return gated(GateTensors(), gate, part, linear)


@operator("experts", contracts=True)
class Experts(Call[V]):
    """`gralora::experts`: `sum(weight * expert(x))` over the experts of each token, as in transformers' models.

    An expert is `down @ gate(up @ x + up bias) + down bias` (see `ExpertGate`). The result has the shape and dtype of
    `hidden`.
    """

    hidden: V  # `[tokens, size]`
    index: V  # `[tokens, k]`, the experts of each token; the number of experts means none, as in transformers
    weights: V  # `[tokens, k]`, factors of the experts' outputs
    up: V  # `[experts, outputs, size]`; outputs are twice the width if there is a gate
    down: V  # `[experts, size, width]`
    up_bias: V | None  # `[experts, outputs]`, or None
    down_bias: V | None  # `[experts, size]`, or None
    is_transposed: bool  # whether `up` is `[experts, size, outputs]` and `down` is `[experts, width, size]`
    activation: str  # see `ExpertGate`, as for the others
    layout: str  # see there
    alpha: float  # see there
    offset: float  # see there
    limit: float  # see there

    @property
    def gate(self) -> ExpertGate:
        """The function between the two products."""
        return ExpertGate(self.activation, self.layout, self.alpha, self.offset, self.limit)

    def result(self: Experts[Tensor]) -> Tensor:
        """Compute the reference: tokens sorted by expert, and one product per expert that some token has."""
        last = self.up.shape[0] - 1
        weights = self.weights.masked_fill(self.index > last, 0)
        experts, order = torch.sort(self.index.clamp(max=last).reshape(-1), stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.up.shape[0], device=experts.device), right=True)
        x = self.hidden[order // self.index.shape[1]]
        inner = between(self.gate, self._product(x, self.up, self.up_bias, experts, ends))
        outer = self._product(inner, self.down, self.down_bias, experts, ends)
        outer = outer[torch.argsort(order)].reshape(*self.index.shape, -1)
        return (outer * weights.unsqueeze(-1)).sum(1).to(self.hidden.dtype)

    def _product(
        self: Experts[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, ends: Tensor
    ) -> Tensor:
        y = grouped_product(x, weight if self.is_transposed else weight.transpose(1, 2), ends)
        return y if bias is None else y + bias[experts]

    def shape_only(self: Experts[Tensor]) -> Tensor:
        """Return an empty tensor of the result's shape."""
        return torch.empty_like(self.hidden)
