"""Parts of a graph that are traced again before an export: decomposed operators, and writes into shared tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

from gralora_fx import trace
from gralora_fx.exporters.translation.retrace import Decompose, functionalize

_aten = torch.ops.aten


def graph_of(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graph_module = trace(module, inputs).graph_module
    for node in graph_module.graph.find_nodes(op="get_attr"):
        node.meta["val"] = getattr(graph_module, str(node.target))
    return graph_module


def counted(graph_module: fx.GraphModule) -> Counter[object]:
    return Counter(node.target for node in graph_module.graph.nodes if node.op == "call_function")


class Parts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], 6)
        y[:, :3] = x
        y[:, 3:] = x * 2
        return y + 1


class Later(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first = y[:, 0]
        y.add_(1)
        return y * first.unsqueeze(1)


class OfSeveral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, places = torch.topk(x, 2, dim=-1)
        values /= values.sum(-1, keepdim=True)
        return values.to(torch.float64) * places


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first = y[:, 0]
        y.clamp_(-1, 1)
        return y * first.unsqueeze(1)


@pytest.mark.parametrize("module", [Parts(), Later(), OfSeveral(), Clamped()], ids=lambda module: type(module).__name__)
def test_writes_into_shared_tensors_become_values(module: nn.Module) -> None:
    x = torch.randn(4, 3)
    graph_module = graph_of(module, x)
    assert functionalize(graph_module.graph).changed == 1
    graph_module.graph.lint()
    graph_module.recompile()
    assert not [
        target for target in counted(graph_module) if getattr(target, "_schema", None) and target._schema.is_mutable
    ]  # type: ignore[attr-defined]
    assert torch.equal(graph_module(x=x), module(x))


def test_a_write_that_nothing_shares_stays() -> None:
    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).add_(1)

    graph_module = graph_of(Alone(), torch.randn(4, 3))
    assert functionalize(graph_module.graph).changed == 0
    assert counted(graph_module)[_aten.add_.Tensor] == 1


def test_only_unknown_operators_are_taken_apart() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            largest, _ = torch.relu(x).square().max(-1)
            return torch.min(largest, x.sum(-1))

    x = torch.randn(4, 3)
    graph_module = graph_of(Mixed(), x)
    known = set(counted(graph_module)) - {_aten.square.default, _aten.min.other}
    assert Decompose(known, dict)(graph_module.graph).changed == 2
    graph_module.graph.lint()
    graph_module.recompile()
    counts = counted(graph_module)
    assert (counts[_aten.relu.default], counts[_aten.pow.Tensor_Scalar], counts[_aten.minimum.default]) == (1, 1, 1)
    assert torch.allclose(graph_module(x=x), Mixed()(x))


def test_what_a_decomposition_writes_in_place_is_a_value_too() -> None:
    x = torch.randn(4, 8)
    graph_module = graph_of(nn.RMSNorm(8), x)
    table = torch.export.default_decompositions()
    assert Decompose(set(), lambda: dict(table.items()))(graph_module.graph).changed > 0
    assert not [target for target in counted(graph_module) if target._schema.is_mutable]  # type: ignore[attr-defined]
    graph_module.recompile()
    assert torch.allclose(graph_module(x), nn.RMSNorm(8)(x), atol=1e-6)
