"""Weights that share memory, whatever their parameters are called: found by address, and refused or split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gralora_fx.core.adapters.folded_weights
from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.core.adapters.folded_weights import overlapping
from gralora_fx.errors import MergeError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(torch.tanh(self.one(x))))


def by_data(net: Pair) -> None:
    net.two.weight.data = net.one.weight.data


def by_rows(net: Pair) -> None:
    big = torch.randn(12, 8)
    net.one.weight, net.two.weight = nn.Parameter(big[:8]), nn.Parameter(big[4:])


def by_strides(net: Pair) -> None:
    big = torch.randn(200)
    net.one.weight = nn.Parameter(big.as_strided((8, 8), (8, 1)))
    net.two.weight = nn.Parameter(big.as_strided((8, 8), (1, 8), 3))


def by_numpy(net: Pair) -> None:
    values = torch.randn(8, 8).numpy()
    net.one.weight, net.two.weight = (nn.Parameter(torch.from_numpy(values)) for _ in range(2))


SHARED = [by_data, by_rows, by_strides, by_numpy]


def adapted(share: Callable[[Pair], None], targets: list[str]) -> tuple[Pair, GraloraModel]:
    torch.manual_seed(0)
    net = Pair().eval()
    share(net)
    return net, rewrite(trace(net, (X,)), GraloraConfig(r=4, target_modules=targets, init_weights=False))


@pytest.mark.parametrize("targets", [["three", "one"], ["one", "two"]], ids=str)
@pytest.mark.parametrize("share", SHARED)
def test_shared_memory_is_refused_or_split(share: Callable[[Pair], None], targets: list[str]) -> None:
    net, model = adapted(share, targets)
    before = [weight.clone() for weight in net.parameters()]
    expected, base = model(X), net(X)
    for fold in (model.merge_adapter, model.merge_and_unload, lambda: merge(model)):
        with pytest.raises(MergeError, match=r"the weight of one \(in memory that two\.weight uses too\)"):
            fold()
        assert torch.equal(model(X), expected)
    assert torch.allclose(merge(model, untie=True)(X), expected, atol=1e-5)
    model.merge_adapter(untie=True)
    assert torch.allclose(model(X), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    assert all(torch.equal(weight, was) for weight, was in zip(net.parameters(), before, strict=True))
    assert torch.equal(net(X), base)
    assert torch.allclose(model.merge_and_unload(untie=True)(X), expected, atol=1e-5)


def side_by_side(net: Pair) -> None:
    big, wide = torch.randn(16, 8), torch.randn(8, 16)
    net.one.weight, net.two.weight = nn.Parameter(big[:8]), nn.Parameter(big[8:])
    net.three.weight = nn.Parameter(wide[:, :8])


def test_parts_of_one_buffer_that_do_not_overlap_are_folded() -> None:
    net, model = adapted(side_by_side, ["one", "two", "three"])
    expected = model(X)
    assert torch.allclose(model.merge_and_unload()(X), expected, atol=1e-5)
    assert torch.allclose(net(X), expected, atol=1e-5)


def expanded(net: Pair) -> None:
    net.two.weight = nn.Parameter(torch.randn(8).expand(8, 8))


def test_a_weight_whose_elements_share_memory_gets_its_own() -> None:
    net, model = adapted(expanded, ["one", "two"])
    expected = model(X)
    assert torch.allclose(model.merge_and_unload()(X), expected, atol=1e-5)
    assert torch.allclose(net(X), expected, atol=1e-5)


@pytest.mark.parametrize("make", [expanded, side_by_side])
def test_merge_and_unload_looks_for_what_is_wrong_before_it_changes_a_weight(make: Callable[[Pair], None]) -> None:
    net, model = adapted(make, ["one", "two", "three"])
    before, expected = [weight.clone() for weight in net.parameters()], model(X)
    factor = model.adapter("default").factors["three"].B
    was = factor.detach().clone()
    factor.data[0, 0, 0] = float("inf")
    with pytest.raises(MergeError, match="three is not finite"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(weight, was) for weight, was in zip(net.parameters(), before, strict=True))
    factor.data.copy_(was)
    assert torch.equal(model(X), expected)
    assert torch.allclose(model.merge_and_unload(safe_merge=True)(X), expected, atol=1e-5)


def test_merge_and_unload_takes_no_memory_beside_a_weight() -> None:
    net, model = adapted(lambda _: None, ["one"])
    address = net.one.weight.data_ptr()
    model.merge_and_unload()
    assert net.one.weight.data_ptr() == address


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_error_in_the_middle_of_a_fold_changes_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, model = adapted(lambda _: None, ["one", "two", "three"])
    before, expected = [weight.clone() for weight in net.parameters()], model(X)
    fold, calls = gralora_fx.core.adapters.folded_weights.fold, 0

    def out_of_memory(*args: object, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise MemoryError("no memory is left")
        return fold(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(gralora_fx.core.adapters.folded_weights, "fold", out_of_memory)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert all(torch.equal(weight, was) for weight, was in zip(net.parameters(), before, strict=True))
    assert torch.equal(model(X), expected)
    monkeypatch.undo()
    model.merge_adapter()


def test_a_copy_of_a_module_in_shared_memory_is_not_written_into_the_base() -> None:
    torch.manual_seed(0)
    net = Pair().eval()
    by_data(net)
    config = GraloraConfig(r=4, target_modules=["three"], modules_to_save=["one"], init_weights=False)
    model = rewrite(trace(net, (X,)), config)
    with torch.no_grad():
        model.adapter("default").copies["one"]["one.weight"].mul_(2)
    expected, before = model(X), net.one.weight.clone()
    with pytest.raises(MergeError, match=r"one\.weight of one is tied with two\.weight, which would change too"):
        model.merge_and_unload()
    assert torch.equal(net.one.weight, before)
    assert torch.allclose(merge(model)(X), expected, atol=1e-5)


def test_what_overlaps_is_told_by_elements() -> None:
    big = torch.zeros(8, 8)
    tensors = {
        "left": big[:, :4],
        "right": big[:, 4:],
        "row": big[2],
        "again": big[2],
        "bytes": big.view(torch.uint8)[7],
        "meta": torch.zeros(2, device="meta"),
        "other": torch.zeros(8),
    }
    overlaps = {name: set(others) for name, others in overlapping(tensors).items()}
    assert overlaps == {
        "left": {"row", "again", "bytes"},
        "right": {"row", "again", "bytes"},
        "row": {"left", "right", "again"},
        "again": {"left", "right", "row"},
        "bytes": {"left", "right"},
    }
