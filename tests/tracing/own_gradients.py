"""Modules with gradients of their own, at the top of a module so that they can be pickled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Rounded(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Any) -> Tensor:
        return torch.round(x * steps) / steps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class Reversed(torch.autograd.Function):
    """The identity, with a reversed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -2 * gradients[0]


class Product(torch.autograd.Function):
    """Several results, one of them none, with a gradient that is not theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        return x * y, None, y.sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], gradients[0] * 3


class ClippedGradient(torch.autograd.Function):
    """The identity, whose gradient differs only where it is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].clamp(-1e3, 1e3)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)


class Straight(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Rounded.apply(self.a(x), x.shape[1]))


class Final(Three):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(self.b(self.a(x)), 4)


class Adversarial(Three):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        body = self.a(x)
        return self.b(body), self.c(Reversed.apply(body))


class Several(Three):
    def forward(self, x: Tensor) -> Tensor:
        product, _, total = Product.apply(self.a(x), self.b(x))
        return self.c(product) + total.unsqueeze(-1)


class Clipped(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(ClippedGradient.apply(self.a(x)))


class Unlearned(Three):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = Reversed.apply(self.b(x))
        return self.c(Reversed.apply(self.a(x)) * gate)


class Quantized(Three):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x), Rounded.apply(self.b.weight, 4), self.b.bias)


class Hooked(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = self.b(h)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * -3)
        return y


class Masked(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mask = (h > 0).float()
        y = self.b(h.sin())
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * mask)
        return y


class ModuleHooked(Three):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.inner.register_full_backward_hook(lambda _, inputs, outputs: tuple(2 * each for each in inputs))
        self.inner.register_full_backward_pre_hook(lambda _, outputs: tuple(5 * each for each in outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.inner(self.a(x)))


class RootHooked(Three):
    """With hooks of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_hook(lambda _, inputs, outputs: tuple(2 * each for each in inputs))
        self.register_full_backward_pre_hook(lambda _, outputs: tuple(5 * each for each in outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).tanh())
