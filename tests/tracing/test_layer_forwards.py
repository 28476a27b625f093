"""Linear layers with a forward of their own: adapted where that equals PEFT's adapter after it, else rejected."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from gralora_fx import GraloraConfig, merge, plan, rewrite, trace
from gralora_fx.errors import TargetError

PATHS = ["first", "inner"]


class Linear(nn.Linear):
    """A layer with a scale, a shift and layers of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.shift = nn.Parameter(torch.randn(8))
        self.act, self.norm, self.drop = nn.GELU(), nn.LayerNorm(8), nn.Dropout(0.5)
        self.low = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))


class Scaled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Activated(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x) + self.shift)


class Dropped(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class Gated(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y.sigmoid()


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y


class InPlace(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y *= 2.0
        return y


class Normalized(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Twice(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Subtracted(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.shift - super().forward(x)


class ScaledConv1D(Conv1D):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Hooked(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, inputs, output: output * 3)


CHANGED = [Scaled, Activated, Dropped, Gated, Doubled, InPlace, Normalized, Twice, Subtracted, ScaledConv1D, Hooked]


class Plain(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Added(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.shift + super().forward(x) + self.low(x) - x.mean()


class Reshaped(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, 8).to(torch.float32)).view(x.shape[0], x.shape[1], 8).to(x.dtype)


class WithOwnBias(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Counting(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.zeros(y.shape[-1])


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(8, 8))


KEPT = [Plain, Added, Reshaped, WithOwnBias, Counting, normed]


class Net(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), kind(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.inner(F.relu(self.first(x)))))


def as_it_is(net: nn.Module) -> nn.Module:
    return net


def both_ways(kinds: list[Callable[[], nn.Module]]) -> list[tuple[Callable[[], nn.Module], Callable[..., nn.Module]]]:
    """Each kind by itself and as a symbolic trace, which shows no hooks and no parametrizations."""
    return [(kind, source) for kind in kinds for source in (as_it_is, fx.symbolic_trace) if not _is_lost(kind, source)]


def _is_lost(kind: Callable[[], nn.Module], source: Callable[..., nn.Module]) -> bool:
    return source is fx.symbolic_trace and kind in (Hooked, normed)


@pytest.mark.parametrize(("kind", "source"), both_ways(CHANGED))
def test_a_layer_that_changes_its_product_is_rejected(
    kind: Callable[[], nn.Module], source: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    net = Net(kind).eval()
    traced = trace(source(net), (torch.randn(3, 5, 8),))
    planned = plan(traced, GraloraConfig(r=4, target_modules=PATHS))
    reasons = {entry.site.path: entry.reason for entry in planned.rejected}
    assert "PEFT's adapter" in reasons["inner"]
    assert [entry.site.path for entry in planned.selected] == ["first"]
    with pytest.raises(TargetError, match=r"inner.*its forward changes"):
        plan(traced, GraloraConfig(r=4, target_modules=["inner"]))


@pytest.mark.parametrize(("kind", "source"), both_ways(KEPT))
def test_a_layer_that_moves_its_product_or_adds_to_it_is_adapted_as_by_peft(
    kind: Callable[[], nn.Module], source: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    net = Net(kind).eval()
    ours = rewrite(trace(source(net), (torch.randn(3, 5, 8),)), GraloraConfig(r=4, target_modules=PATHS))
    theirs = peft.get_peft_model(
        copy.deepcopy(net), peft.GraloraConfig(r=4, target_modules=PATHS, init_weights=False)
    ).eval()
    tensors = dict(theirs.named_parameters())
    with torch.no_grad():
        for path in PATHS:
            for name in "AB":
                getattr(ours.factors(path), name).copy_(tensors[f"base_model.model.{path}.gralora_{name}.default"])
        x = torch.randn(2, 3, 8)
        expected = theirs(x)
        assert (expected - net(x)).abs().max() > 1e-3
        assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        if kind is not normed:
            assert (merge(ours)(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Branching(nn.Module):
    """A layer within a branch."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), kind()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cond(x.sum() > 0, lambda x: self.inner(x), lambda x: x + 1, (x,))


@pytest.mark.parametrize(("kind", "selected"), [(Scaled, ["first"]), (lambda: nn.Linear(8, 8), PATHS)])
def test_a_class_with_a_forward_of_its_own_is_rejected_within_a_branch(
    kind: Callable[[], nn.Module], selected: list[str]
) -> None:
    traced = trace(Branching(kind).eval(), (torch.randn(3, 8),))
    planned = plan(traced, GraloraConfig(r=4, target_modules=PATHS))
    assert [entry.site.path for entry in planned.selected] == selected
    reasons = {entry.site.path: entry.reason for entry in planned.rejected}
    assert "inner" in selected or "does not show what" in reasons["inner"]
