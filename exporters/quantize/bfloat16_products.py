"""Products in bfloat16 where a float model only draws texts or is measured: native ones take a third of the time.

Sums are float32's; factors and results are rounded to eight bits, which changes far less than rounding weights does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import multiplies_bfloat16
from gralora_fx.core.graph.linear_calls import LinearCall, calls_at, readers
from gralora_fx.core.graph.packed_weights import StreamedWeight, runnable
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.tracing.traced_model import TracedModel

_LEAST = 2**20  # values of a weight; the casts of smaller ones would take as long as they save
_LINEAR = {torch.ops.aten.linear.default, torch.nn.functional.linear}  # of weights `[out, in]`; others take `[in, out]`


@dataclass(frozen=True, eq=False)
class Bfloat16Product:
    """Runs a linear layer's operator in bfloat16, forward and backward; its weight requires no gradient."""

    target: Callable[..., Tensor]
    weight: int  # its position among the arguments, after the input's
    __name__ = "bfloat16_product"

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the operator's result in float32."""
        result: Tensor = _Product.apply(self, *arguments)  # type: ignore[no-untyped-call]
        return result

    def multiplied(self, *arguments: Any) -> Tensor:
        """Return the result without a gradient."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return self.target(*arguments).float()


class _Product(torch.autograd.Function):
    """Saves the weight alone, as it was given: autocast's own copies of all weights would be kept."""

    @staticmethod
    def forward(ctx: Any, product: Bfloat16Product, *arguments: Any) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(arguments[product.weight])
        return product.multiplied(*arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        product, weight = ctx.product, ctx.saved_tensors[0].bfloat16()
        weight = weight if product.target in _LINEAR else weight.mT
        result: list[Any] = [None] * len(ctx.needs_input_grad)
        result[product.weight] = (gradient.bfloat16() @ weight).float()  # by the input, which is before the weight
        return tuple(result)


def narrow_products(model: TracedModel) -> dict[fx.Node, Bfloat16Product]:
    """Return what to run in the place of a float32 model's large products, by node.

    There are none if the processor multiplies bfloat16 no faster.
    """
    if not multiplies_bfloat16():
        return {}
    return {call.node: Bfloat16Product(call.node.target, position + 1) for call, position in _large(model)}  # type: ignore[arg-type]


def _large(model: TracedModel) -> Iterator[tuple[LinearCall, int]]:
    """Yield the calls of large weights, and the position of each one's input among its arguments."""
    nodes = {node.name: node for node in model.graph_module.graph.nodes}
    for site in model.sites:
        if site.weight.numel() < _LEAST or site.weight.dtype != torch.float32:
            continue
        for call in (call for name in site.calls for call in calls_at(nodes[name], site.path)):
            is_plain = call.operand is None and call.node.op == "call_function" and not call.node.kwargs
            if is_plain and (call.added is None or call.bias is not None):
                yield call, call.node.args.index(call.input)


def with_bfloat16_products(model: TracedModel) -> TracedModel:
    """Copy a float32 model with its large products in bfloat16; return the model itself if it has none to change.

    Before: `w = streamed_weight(); y = linear(x, w)`
    After:  `w = streamed_weight(); y = bfloat16_product(x, w)`, the weight read in bfloat16
    """
    root = runnable(model.graph_module)
    found = {
        node.name: product for node, product in narrow_products(dataclasses.replace(model, graph_module=root)).items()
    }
    if not found:
        return model
    root = fx.GraphModule(root, copy_graph(root), "NarrowGraph")
    for node in root.graph.nodes:
        node.target = found.get(node.name, node.target)
    for node in root.graph.nodes:
        weight = node.target
        if isinstance(weight, StreamedWeight) and all(
            isinstance(reader.target, Bfloat16Product) for reader in readers(node)
        ):
            node.target = dataclasses.replace(weight, dtype=torch.bfloat16)
    root.recompile()
    return dataclasses.replace(model, graph_module=root)
