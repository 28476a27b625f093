"""Parameters of a tree of modules, replaced in one go."""

from __future__ import annotations

import torch
from torch import nn

from gralora_fx.core.graph.surgery import map_parameters


def test_every_parameter_is_replaced_once_and_tied_ones_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3))
            self.head = nn.Linear(2, 2, bias=False)
            self.head.weight = self.inner[0].weight
            self.scale = nn.Parameter(torch.ones(1))

    model, paths = Tied(), []
    kept = model.inner[1].bias

    def doubled(parameter: nn.Parameter, path: str) -> nn.Parameter:
        paths.append(path)
        return parameter if parameter is kept else nn.Parameter(2 * parameter.detach())

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    map_parameters(model, doubled)
    assert paths == ["scale", "inner.0.weight", "inner.1.weight", "inner.1.bias"]
    assert model.head.weight is model.inner[0].weight
    assert model.inner[1].bias is kept
    factors = {name: 1 if name == "inner.1.bias" else 2 for name in before}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, factors[name] * before[name])
