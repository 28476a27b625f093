"""Adapted layers: one node each of what runs in training, with the values and gradients of plain nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import text_batch
from torch import Tensor, fx, nn
from torch.nn.functional import linear
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, rewrite
from gralora_fx.core.adapters.fuse_linears import adapted_linear, fuse_adapted_linears, share_input
from gralora_fx.core.methods.low_rank import accumulate, project

DOUBLE = torch.float64
METHODS: dict[str, Any] = {
    "gralora": GraloraConfig(r=4, target_modules="all-linear", init_weights=False),
    "hybrid": GraloraConfig(r=4, hybrid_r=2, target_modules="all-linear", init_weights=False),
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
}


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, requires_grad=True)


class Layers:
    """Three layers of one input: LoRA, and GraLoRA with two ranks, one of them beside a bias."""

    def __init__(self, drops: bool) -> None:
        torch.manual_seed(0)
        self.x, self.dropped = values(2, 3, 8), values(2, 3, 8) if drops else None
        self.weights, self.biases = [values(12, 8), values(4, 8), values(8, 8)], [None, values(4), values(8)]
        self.As = [values(4, 8), values(2, 4, 4), values(2, 4, 2)]
        self.Bs = [values(12, 4), values(2, 4, 2), values(2, 2, 4)]
        self.scales = [2.0, 0.5, 1.0]

    @property
    def tensors(self) -> list[Tensor]:
        every = [self.x, self.dropped, *self.weights, *self.biases, *self.As, *self.Bs]
        return [tensor for tensor in every if tensor is not None]

    def fused(self, *_: Tensor) -> tuple[Tensor, ...]:
        layers = zip(self.weights, self.biases, self.As, self.Bs, self.scales, strict=True)
        shared = share_input(self.x)
        return tuple(
            adapted_linear(self.x, self.dropped, w, b, [A], [B], [s], [None], shared) for w, b, A, B, s in layers
        )

    def apart(self) -> tuple[Tensor, ...]:
        layers = zip(self.weights, self.biases, self.As, self.Bs, self.scales, strict=True)
        read = self.x if self.dropped is None else self.dropped
        return tuple(accumulate(linear(self.x, w, b), project(read, A), B, s) for w, b, A, B, s in layers)


@pytest.mark.parametrize("drops", [False, True])
def test_values_and_gradients_of_every_order_are_those_of_the_layers_apart(drops: bool) -> None:
    layers = Layers(drops)
    for ours, expected in zip(layers.fused(), layers.apart(), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12)
    assert torch.autograd.gradcheck(layers.fused, layers.tensors)
    assert torch.autograd.gradgradcheck(layers.fused, layers.tensors)


def test_a_layer_that_the_loss_does_not_read_gets_no_gradient() -> None:
    layers = Layers(drops=False)
    ours, expected = (
        torch.autograd.grad(outputs[1].sum(), layers.tensors, allow_unused=True)
        for outputs in (layers.fused(), layers.apart())
    )
    assert [gradient is None for gradient in ours] == [gradient is None for gradient in expected]
    for one, other in zip(ours, expected, strict=True):
        assert one is None or torch.allclose(one, other)  # type: ignore[arg-type]


def nodes_of(model: GraloraModel) -> list[list[str]]:
    """Return the layers that share an input, or are alone, of every adapted one of what runs."""
    modules = [module for module in model._state.current.running.modules() if isinstance(module, fx.GraphModule)]
    groups: dict[object, list[str]] = {}
    for module in modules:
        for node in module.graph.find_nodes(op="call_function", target=adapted_linear):
            groups.setdefault(node if node.args[-1] is None else node.args[-1], []).append(str(node.args[2].target))
    return list(groups.values())


def gradients(model: GraloraModel, runs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    runs(**text_batch())[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_step_is_that_of_the_nodes_of_the_flat_graph(method: str, dropout: float) -> None:
    config = METHODS[method]
    model = rewrite(fresh_trace("llama"), config.changed(**{config.DROPOUT: dropout})).train()
    queries = [[path for path in paths if "attn" in path] for paths in nodes_of(model)]
    expected = [["q", "k", "v"], ["o"]]
    assert [[path.split("self_attn.")[1][0] for path in paths] for paths in queries if paths] == 2 * expected
    flat, joined = gradients(model, model.graph_module), gradients(model, model)
    assert flat.keys() == joined.keys()
    for key, gradient in joined.items():
        assert torch.allclose(gradient, flat[key], rtol=1e-4, atol=1e-6), key


def test_evaluation_and_layers_that_something_else_reads_are_as_they_were() -> None:
    model = rewrite(fresh_trace("llama"), METHODS["gralora"]).eval()
    assert not nodes_of(model)

    def reads_queries(graph_module: fx.GraphModule) -> None:
        """Add a reader of the first layer's own output, which its adapter must not overwrite."""
        graph = graph_module.graph
        node = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
        with graph.inserting_after(node):
            graph.call_function(torch.relu, (node,))

    before = gradients(model.train(), model)
    model.add_pass(reads_queries)
    for key, gradient in gradients(model, model).items():
        assert torch.allclose(gradient, before[key], rtol=1e-4, atol=1e-6), key
    assert ["k", "v"] in [[path.split("self_attn.")[-1][0] for path in paths] for paths in nodes_of(model)]


def test_a_layer_after_a_write_into_its_input_reads_what_was_written() -> None:
    graph = fx.Graph()
    x, w, a, b = (graph.placeholder(name) for name in "xwab")
    outputs = []
    for _ in range(2):
        y = graph.call_function(torch.ops.aten.linear.default, (x, w))
        outputs.append(graph.call_function(accumulate, (y, graph.call_function(project, (x, a)), b, 1.0)))
        graph.call_function(torch.ops.aten.mul_.Tensor, (x, 2.0))
    graph.output(tuple(outputs))
    assert fuse_adapted_linears(graph).changed == 2
    tensors = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)]
    first, second = fx.GraphModule(nn.Module(), graph)(*tensors)
    assert torch.allclose(second, 2 * first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_own_precision(dtype: torch.dtype) -> None:
    model = rewrite(fresh_trace("llama"), METHODS["gralora"]).train()
    with torch.autocast("cpu", dtype):
        flat, joined = gradients(model, model.graph_module), gradients(model, model)
    assert all(torch.equal(gradient, flat[key]) for key, gradient in joined.items())
