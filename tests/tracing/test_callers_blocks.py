"""A trace within a caller's `inference_mode`, `no_grad`, `autocast` or device block is as outside of it."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gralora_fx import LoraConfig, rewrite, trace
from gralora_fx.errors import TraceError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.BatchNorm1d(5), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)) + torch.arange(16)
        return self.second(torch.relu(h.to(self.first.weight.dtype)))


@pytest.mark.parametrize(
    "block",
    [torch.inference_mode(), torch.no_grad(), torch.autocast("cpu"), torch.device("meta")],
    ids=["inference_mode", "no_grad", "autocast", "meta"],
)
def test_a_trace_in_a_block_is_as_outside_and_trains(block: AbstractContextManager[Any]) -> None:
    model, x = Model(), torch.randn(2, 5, 16)
    expected = str(trace(model, (x,)).graph_module.graph)
    with block:
        traced = trace(model, (x if x.is_meta is False and torch.is_grad_enabled() else x.clone(),))
    assert str(traced.graph_module.graph) == expected
    assert torch.equal(traced.eval()(x), model.eval()(x))
    rewritten = rewrite(traced, LoraConfig(r=4, target_modules="all-linear")).train()
    rewritten(x).sum().backward()
    assert all(p.grad is not None for p in rewritten.parameters() if p.requires_grad)


def test_parameters_of_inference_mode_are_refused_and_a_copy_of_them_is_traced() -> None:
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        model = Model()
        with pytest.raises(TraceError, match=r"first\.weight of the Model was made under torch\.inference_mode"):
            trace(model, (x,))
    trace(copy.deepcopy(model), (x,))
