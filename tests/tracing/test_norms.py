"""Norms with running statistics train, count and stay in evaluation as in the source model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gralora_fx import GraloraConfig, LoraConfig, merge, rewrite, trace


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.norm, self.times = nn.Linear(16, 16), norm, times

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).transpose(1, 2)
        for _ in range(self.times):
            h = 2 * self.norm(h)
        return h.transpose(1, 2)


class Frozen(Normed):
    """A model that keeps its norm and a dropout in evaluation, and another dropout in training."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.never = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        self.never.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.never(super().forward(x)), 0.5, training=False)


class FrozenInEveryForm(Frozen):
    """The same, with noise in training, so that it is traced in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) if self.training else 0.0
        return self.never(Normed.forward(self, x)) + 0.0 * noise


def norms() -> dict[str, nn.Module]:
    return {
        "batch norm": Normed(nn.BatchNorm1d(16)),
        "called twice": Normed(nn.BatchNorm1d(16), 2),
        "of all batches": Normed(nn.BatchNorm1d(16, momentum=None)),
        "of all batches, called twice": Normed(nn.BatchNorm1d(16, momentum=None, affine=False), 2),
        "of a batch alone": Normed(nn.BatchNorm1d(16, track_running_stats=False)),
        "instances": Normed(nn.InstanceNorm1d(16, track_running_stats=True, affine=True)),
        "instances alone": Normed(nn.InstanceNorm1d(16)),
        "synchronized": Normed(nn.SyncBatchNorm(16)),
        "kept in evaluation": Frozen(nn.BatchNorm1d(16)),
        "instances kept in evaluation": Frozen(nn.InstanceNorm1d(16, track_running_stats=True)),
    }


def shuffled(model: nn.Module) -> nn.Module:
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return model


def assert_same_steps(one: Any, other: Any, x: Tensor) -> None:
    """Run both in evaluation and training; compare outputs and every buffer after each step."""
    for mode in (False, True, True, False):
        one.train(mode)
        other.train(mode)
        torch.testing.assert_close(one(x), other(x))


@pytest.mark.parametrize("name", norms())
def test_a_trace_and_an_adapted_model_update_the_buffers_of_the_model(name: str) -> None:
    model, x = shuffled(norms()[name]), torch.randn(3, 5, 16)
    reference = copy.deepcopy(model)
    traced = trace(model, (x,))
    assert_same_steps(traced, reference, x)
    assert_same_steps(rewrite(traced, LoraConfig(r=4, target_modules="all-linear")), reference, x)
    for buffer, expected in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def test_what_a_model_keeps_in_evaluation_stays_there_if_only_evaluation_can_be_traced() -> None:
    model, x = shuffled(FrozenInEveryForm(nn.BatchNorm1d(16))), torch.randn(3, 5, 16)
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="training runs"):
        traced = trace(model, (x,))
    assert_same_steps(traced, reference, x)
    for buffer, expected in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("name", ["batch norm", "of all batches", "instances"])
def test_a_merged_model_and_its_source_train_apart(name: str) -> None:
    x = torch.randn(3, 5, 16)
    model = rewrite(trace(norms()[name], (x,)), GraloraConfig(r=4, target_modules="all-linear"))
    merged: Any = merge(model)
    before = [buffer.clone() for buffer in model.buffers()]
    merged.train()(x)
    assert all(map(torch.equal, before, model.buffers()))
    after = [buffer.clone() for buffer in merged.graph_module.buffers()]
    assert not all(map(torch.equal, before, after))
    model.train()(3 * x)
    assert all(map(torch.equal, after, merged.graph_module.buffers()))
