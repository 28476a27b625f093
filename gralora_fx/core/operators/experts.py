"""A mixture's experts: one node a layer, of which each token passes those that a router chose for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gralora_fx.base.compat.transformers_models import grouped_product
from gralora_fx.core.operators.call import Call, V, operator
from gralora_fx.core.operators.expert_gate import HALVES, NO_GATE, ExpertGate

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
    "identity": lambda x: x,
}


def gated(gate: ExpertGate, x: Tensor) -> Tensor:
    """The second product's input, `[..., width]`, of the first one's output.

    Args:
        gate: What is computed.
        x: `[..., outputs]`.
    """
    if gate.layout == NO_GATE:
        return _activated(gate, x)
    part, linear = x.chunk(2, dim=-1) if gate.layout == HALVES else (x[..., ::2], x[..., 1::2])
    if gate.limit:
        part, linear = part.clamp(max=gate.limit), linear.clamp(-gate.limit, gate.limit)
    return _activated(gate, part) * (linear + gate.offset if gate.offset else linear)


def _activated(gate: ExpertGate, x: Tensor) -> Tensor:
    if gate.activation == "silu" and gate.alpha != 1:
        return x * torch.sigmoid(x * gate.alpha)
    return ACTIVATIONS[gate.activation](x)


@operator("experts")
class Experts(Call[V]):
    """`gralora::experts`: `sum(weight * expert(x))` over the experts of each token, as transformers' models have them.

    An expert is `down @ gate(up @ x + up bias) + down bias` (see `ExpertGate`). The result is as `hidden`.

    Attributes:
        hidden: `[tokens, size]`.
        index: `[tokens, k]`, the experts of each token; their number stands for none, as in transformers.
        weights: `[tokens, k]`, what the output of each is multiplied by.
        up: `[experts, outputs, size]`; outputs are twice the width where there is a gate.
        down: `[experts, size, width]`.
        up_bias: `[experts, outputs]`, or None.
        down_bias: `[experts, size]`, or None.
        is_transposed: Whether `up` is `[experts, size, outputs]` and `down` is `[experts, width, size]`.
        activation: As in `ExpertGate`, and so the others.
        layout: See there.
        alpha: See there.
        offset: See there.
        limit: See there.
    """

    hidden: V
    index: V
    weights: V
    up: V
    down: V
    up_bias: V | None
    down_bias: V | None
    is_transposed: bool
    activation: str
    layout: str
    alpha: float
    offset: float
    limit: float

    @property
    def gate(self) -> ExpertGate:
        """What is computed between the two products."""
        return ExpertGate(self.activation, self.layout, self.alpha, self.offset, self.limit)

    def result(self: Experts[Tensor]) -> Tensor:
        """The reference: tokens in the order of their experts, and a product for each expert that some token has."""
        last = self.up.shape[0] - 1
        weights = self.weights.masked_fill(self.index > last, 0)
        experts, order = torch.sort(self.index.clamp(max=last).reshape(-1), stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.up.shape[0], device=experts.device), right=True)
        x = self.hidden[order // self.index.shape[1]]
        inner = gated(self.gate, self._product(x, self.up, self.up_bias, experts, ends))
        outer = self._product(inner, self.down, self.down_bias, experts, ends)
        outer = outer[torch.argsort(order)].reshape(*self.index.shape, -1)
        return (outer * weights.unsqueeze(-1)).sum(1).to(self.hidden.dtype)

    def _product(
        self: Experts[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, ends: Tensor
    ) -> Tensor:
        y = grouped_product(x, weight if self.is_transposed else weight.transpose(1, 2), ends)
        return y if bias is None else y + bias[experts]

    def shape_only(self: Experts[Tensor]) -> Tensor:
        """The shape."""
        return torch.empty_like(self.hidden)
