"""Linear layers that `torch.cond` and loops call: adapted by their weight, which is an operand, or rejected by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as run_for_each
from torch._higher_order_ops.while_loop import while_loop

from gralora_fx import GraloraConfig, GraloraModel, merge, plan, rewrite, trace

LAYERS = ["first", "inner", "last"]
WIDTH = 8


class Net(nn.Module):
    """Three layers, the second one within a branch or a loop: of the graph's operators, or of Python."""

    in_python = False

    def __init__(self, within: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.within = within

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.within(self, self.first(x)))


Part = Callable[[Tensor], Tensor]


def cond(net: Net, condition: Tensor, yes: Part, no: Part, x: Tensor) -> Tensor:
    if net.in_python:
        return yes(x) if condition else no(x)
    chosen: Tensor = torch.cond(condition, yes, no, (x,))
    return chosen


def branch(net: Net, x: Tensor) -> Tensor:
    return cond(net, x[0, 0] > 0, net.inner, lambda x: x * 2, x)


def branch_and_call(net: Net, x: Tensor) -> Tensor:
    return net.inner(cond(net, x[0, 0] > 0, lambda x: net.inner(net.inner(x)), torch.relu, x))


def branch_of_a_branch(net: Net, x: Tensor) -> Tensor:
    return cond(net, x[0, 0] > 0, lambda x: cond(net, x[0, 1] > 0, net.inner, lambda x: x + 1, x), lambda x: x * 2, x)


def loop(net: Net, x: Tensor) -> Tensor:
    if net.in_python:
        for _ in range(3):
            x = torch.tanh(net.inner(x))
        return x
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, torch.tanh(net.inner(x))), (torch.tensor(0), x))[1]


def for_each(net: Net, x: Tensor) -> Tensor:
    return run_for_each(lambda row: net.inner(row), x[:, None]).squeeze(1)


def both(within: Callable[[Net, Tensor], Tensor], **fields: int) -> tuple[nn.Module, GraloraModel]:
    """PEFT's model, which branches and loops in Python, and ours with the same random adapter."""
    torch.manual_seed(0)
    net = Net(within).eval()
    config = peft.GraloraConfig(r=4, target_modules=LAYERS, init_weights=False, **fields)
    plain = copy.deepcopy(net)
    plain.in_python = True
    theirs = peft.get_peft_model(plain, config).eval()
    ours = rewrite(trace(net, (torch.randn(3, WIDTH),)), GraloraConfig(r=4, target_modules=LAYERS, **fields))
    tensors = dict(theirs.named_parameters())
    with torch.no_grad():
        for path in LAYERS:
            for field, tensor in zip(("A", "B", "A_general", "B_general"), ours.factors(path), strict=True):
                if tensor is not None:
                    key = f"base_model.model.{path}.gralora_{field}.default"
                    tensor.copy_(tensors[key if key in tensors else f"{key}.weight"])
    return theirs, ours


def inputs() -> list[Tensor]:
    """Return inputs of which several take each branch."""
    return [torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 5)]


@pytest.mark.parametrize(
    ("within", "fields"),
    [
        pytest.param(branch, {}, id="branch"),
        pytest.param(branch_and_call, {"gralora_k": 4, "hybrid_r": 2}, id="branch and call, hybrid"),
        pytest.param(branch_of_a_branch, {}, id="branch of a branch"),
        pytest.param(loop, {}, id="loop"),
    ],
)
def test_a_layer_within_a_branch_or_loop_is_adapted_as_by_peft(
    within: Callable[[Net, Tensor], Tensor], fields: dict[str, int]
) -> None:
    theirs, ours = both(within, **fields)
    merged = merge(ours)
    for x in inputs():
        theirs.zero_grad()
        ours.zero_grad()
        expected, actual = theirs(x), ours(x)
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (merged(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        expected.square().mean().backward()
        actual.square().mean().backward()
        tensors = dict(theirs.named_parameters())
        for path in LAYERS:
            mine = ours.factors(path).A.grad
            other = tensors[f"base_model.model.{path}.gralora_A.default"].grad
            mine, other = (torch.zeros(()) if grad is None else grad for grad in (mine, other))
            assert (mine - other).abs().max() <= 1e-4 * other.abs().max(), path


def test_the_body_of_a_map_is_adapted() -> None:
    _, ours = both(for_each)  # PEFT's own layer takes no row of two dimensions
    x = inputs()[0]
    alone = ours.traced.site("inner")
    weight = alone.weight + ours.delta_weight("inner")
    hidden = x @ (ours.site("first").weight + ours.delta_weight("first")).T + ours.site("first").bias
    expected = hidden @ weight.T + alone.bias
    expected = expected @ (ours.site("last").weight + ours.delta_weight("last")).T + ours.site("last").bias
    assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("within", [branch, branch_and_call])
def test_adapters_within_a_branch_go_in_and_out(within: Callable[[Net, Tensor], Tensor]) -> None:
    _, model = both(within)
    x = next(x for x in map(torch.randn, [(5, WIDTH)] * 50) if branches(model, x))
    base = [(node.op, str(node.target), str(node.args)) for node in model.traced.graph_module.graph.nodes]
    alone = model(x)
    model.add_adapter("other", GraloraConfig(r=2, target_modules=["inner"], init_weights=False))
    model.set_adapter(["default", "other"])
    together = model(x)
    assert not torch.allclose(together, alone)
    assert model.nodes("inner", "other")
    model.merge_adapter("default")
    assert torch.allclose(model(x), together, rtol=1e-4, atol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(model(x), together)
    with model.disable_adapter():
        assert torch.equal(model(x), model.traced(x))
    unloaded = model.unload()
    assert [(node.op, str(node.target), str(node.args)) for node in unloaded.graph_module.graph.nodes] == base


def branches(model: GraloraModel, x: Tensor) -> bool:
    """Return whether an input takes the branch of the layer, with and without the adapter."""
    first = model.site("first")
    adapted = first.weight + model.delta_weight("first")
    return bool((x @ first.weight.T + first.bias)[0, 0] > 0 and (x @ adapted.T + first.bias)[0, 0] > 0)


def reads_otherwise(net: Net, x: Tensor) -> Tensor:
    return torch.cond(x[0, 0] > 0, net.inner, lambda x: x + net.inner.weight.sum(), (x,))


def test_what_a_branch_cannot_have_is_rejected_by_name() -> None:
    net = Net(branch).eval()
    x = (torch.randn(3, WIDTH),)
    with_dropout = GraloraConfig(r=4, target_modules=LAYERS, gralora_dropout=0.1)
    (rejected,) = plan(trace(net, x), with_dropout).rejected
    assert rejected.site.path == "inner"
    assert "inside the subgraph of cond" in rejected.reason
    assert "gralora_dropout=0.1" in rejected.reason
    (rejected,) = plan(trace(Net(reads_otherwise), x), GraloraConfig(r=4, target_modules=LAYERS)).rejected
    assert rejected.site.path == "inner"
    assert "called inside the subgraph of cond" in rejected.reason
    half = trace(Net(branch).to(torch.bfloat16), (torch.randn(3, WIDTH, dtype=torch.bfloat16),))
    (rejected,) = plan(half, GraloraConfig(r=4, target_modules=LAYERS)).rejected
    assert "bfloat16 would round the update away" in rejected.reason
