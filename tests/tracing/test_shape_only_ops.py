"""Linear layers and concatenations say their shape while a decoder is traced, and are PyTorch's own in the graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, fx, nn

from gralora_fx import trace
from gralora_fx.core.tracing.decoder_operators import shape_only_ops
from gralora_fx.core.tracing.normalize.clean import restore_aten

aten = torch.ops.aten


class Joined(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.first, self.second = dim, nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.first(x), nn.functional.linear(y, self.second.weight), self.second(y)], self.dim)


def graph_of(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    with shape_only_ops():
        program = torch.export.export(model, inputs, dynamic_shapes=[{0: torch.export.Dim.AUTO}] * len(inputs))
    graph_module = program.module(check_guards=False)
    restore_aten(graph_module.graph)
    graph_module.recompile()
    return graph_module


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_the_graph_has_pytorchs_operators_and_their_values(dim: int) -> None:
    model = Joined(dim)
    graph_module = graph_of(model, torch.randn(3, 4, 8), torch.randn(3, 4, 8))
    targets = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
    assert targets.count(aten.linear.default) == 3
    assert targets.count(aten.cat.default) == 1
    assert not any("gralora" in str(target) for target in targets)
    x, y = torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    assert torch.equal(graph_module(x, y), model(x, y))


def test_sizes_that_must_agree_are_one_for_the_tracer() -> None:
    graph_module = graph_of(Joined(1), torch.randn(3, 4, 8), torch.randn(3, 4, 8))
    first, second = (node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder"))
    assert first.shape[0].node.expr == second.shape[0].node.expr


def test_what_is_computed_beside_a_trace_is_as_ever() -> None:
    """Tensors with values, in this thread or in others, do not meet the operators."""
    model, x = Joined(0), torch.randn(3, 4, 8)
    expected = model(x, x)
    with shape_only_ops(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(model(x, x), expected)
        assert torch.equal(pool.submit(model, x, x).result(), expected)
        assert torch.equal(torch.cat([torch.tensor([]), torch.ones(2)]), torch.ones(2))
        assert torch.cat((x, x.double()), dim=1).dtype == torch.float64
    assert nn.functional.linear is torch._C._nn.linear


def test_an_empty_cache_joins_nothing() -> None:
    class Grown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.tensor([]), x], dim=-2)

    x = torch.randn(3, 4, 8)
    assert torch.equal(graph_of(Grown(), x)(x), x)


def test_a_decoders_linear_layers_are_sites() -> None:
    traced = trace(tiny_model("llama"), task="text-generation-with-past")
    graph = traced.graph_module.graph
    assert len(graph.find_nodes(op="call_function", target=aten.linear.default)) == len(traced.sites)
    assert not any("gralora_shapes" in str(node.target) for node in graph.nodes)
