"""Adapted layers in training behave under autograd as the nodes of the flat graph, in plain PyTorch, do."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, rewrite, trace

DOUBLE = torch.float64
CONFIGS: dict[str, Any] = {
    "gralora": GraloraConfig(r=4, target_modules=["q", "k", "v"], init_weights=False),
    "lora": LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=False),
    "dora": DoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=False),
}


class Forward(nn.Module):
    """Three layers, and a forward of its own."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def in_a_row(m: Any, x: Tensor) -> Tensor:
    return m.v(m.k(m.q(x)))


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.q(x)
    y += x
    z = m.k(torch.relu_(y))
    z[..., 0] = 0
    return nn.functional.relu(m.v(x), inplace=True) * z


def branches(m: Any, x: Tensor) -> Tensor:
    h = torch.sin(x)
    return m.q(h) * torch.tanh(m.k(h)) + m.v(h) + h


def heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x + 1
    return m.q(h), m.v(m.k(h))


def training(forward: Callable[..., Any], method: str, *shape: int) -> tuple[GraloraModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=DOUBLE)
    return rewrite(trace(Forward(forward).double(), (x,)), CONFIGS[method]).double().train(), x


def trained(model: GraloraModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.quick
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("forward", [in_a_row, in_place, branches])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 3, 2, 8)], ids=str)
def test_a_step_is_that_of_the_plain_nodes(forward: Any, method: str, shape: tuple[int, ...]) -> None:
    model, x = training(forward, method, *shape)
    x.requires_grad_()
    found, expected = (
        torch.autograd.grad(run(x).square().sum(), [x, *trained(model)]) for run in (model, model.graph_module)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_heads_are_differentiated_one_after_the_other_partly_and_again() -> None:
    model, x = training(heads, "gralora", 2, 5, 8)
    x.requires_grad_()
    p, v = model(x)
    p.sum().backward()
    v.sum().backward()
    total = x.grad
    p, v = model.graph_module(x)
    torch.testing.assert_close(total, torch.autograd.grad(p.sum() + v.sum(), x)[0])
    p, v = model(x)
    first = trained(model)[0]
    torch.autograd.grad(p.sum() + v.sum(), first, retain_graph=True)  # the input's gradient is not asked for
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(p.sum() + v.sum(), x, retain_graph=True)[0], total)


def test_an_interrupted_backward_pass_leaves_nothing_to_the_next() -> None:
    model, x = training(branches, "lora", 2, 5, 8)
    x.requires_grad_()
    loss = model(x).sum()
    seen: list[int] = []

    def interrupt(gradient: Tensor) -> None:
        seen.append(1)
        if len(seen) == 1:
            raise RuntimeError("interrupted")

    trained(model)[0].register_hook(interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        loss.backward(retain_graph=True)
    found = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(model.graph_module(x).sum(), x)[0])


def test_threads_differentiate_one_graph_at_a_time() -> None:
    model, x = training(branches, "gralora", 2, 5, 8)
    x.requires_grad_()
    loss = model(x).sum()
    expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
    found: list[Tensor] = []

    def run() -> None:
        found.extend(torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(torch.allclose(one, expected) for one in found)


# torch scripts decompositions when forward mode is first used
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("method", CONFIGS)
def test_derivatives_of_other_kinds_are_those_of_the_plain_nodes(method: str) -> None:
    model, x = training(branches, method, 3, 8)
    tangent = torch.randn_like(x)
    _, expected = torch.func.jvp(model.graph_module, (x,), (tangent,))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]), model(x)[:, None])
    x.requires_grad_()
    assert torch.autograd.gradcheck(model, x)
    assert torch.autograd.gradgradcheck(model, x)
    batch = torch.eye(24, dtype=DOUBLE).view(24, 3, 8)
    found, expected = (
        torch.autograd.grad(run(x), x, batch, is_grads_batched=True)[0] for run in (model, model.graph_module)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["method", "operator", "function", "view"])
def test_a_pass_that_writes_between_layers_writes_where_it_stands(kind: str) -> None:
    def write(graph_module: fx.GraphModule) -> None:
        graph = graph_module.graph
        sine = next(node for node in graph.nodes if "sin" in str(node.target))
        query = next(node for node in graph.nodes if node.op == "call_function" and "accumulate" in str(node.target))
        with graph.inserting_after(query):
            if kind == "method":
                graph.call_method("mul_", (sine, 2.0))
            elif kind == "operator":
                graph.call_function(operator.imul, (sine, 2.0))
            elif kind == "function":
                graph.call_function(torch.relu_, (sine,))
            else:
                view = graph.call_method("view", (sine, -1))
                view.append(graph.call_method("add_", (view, 1.0)))

    model, x = training(branches, "gralora", 2, 5, 8)
    before = model(x)
    model.add_pass(write)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.graph_module(x))
        assert not torch.allclose(model(x), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as in eager PyTorch
        model(x).sum().backward()


@pytest.mark.parametrize("mode", [True, False])
def test_one_program_compiles_the_model_for_all_sizes(mode: bool) -> None:
    model, x = training(branches, "gralora", 4, 8)
    model.train(mode)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 7, 9):
        x = torch.randn(size, 8, dtype=DOUBLE)
        torch.testing.assert_close(compiled(x), model(x))
