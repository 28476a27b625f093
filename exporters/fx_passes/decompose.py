"""Decomposition of operators without an ONNX form, or their replacement by the constant they compute."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.compat.torch_graphs import OpOverload, is_mutable
from gralora_fx.exporters.fx_passes.matching import expression
from gralora_fx.exporters.fx_passes.retrace import retrace
from gralora_fx.graph.pipeline import PassResult

Table = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class Decompose:
    """Replace every unsupported operator by PyTorch's decomposition of it; the rest of the graph stays.

    Before: `y = square(x)`
    After:  `y = pow(x, 2)`

    An operator without a decomposition stays too.

    Attributes:
        known: Operators to leave as they are.
        decompositions: Returns the decompositions that PyTorch does not apply by itself; called only if an operator is
            unsupported.
    """

    known: Collection[Any]
    decompositions: Callable[[], Table]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Replace them in place, in a graph whose nodes all have their traced values."""
        unknown = [n for n in graph.nodes if isinstance(n.target, OpOverload) and n.target not in self.known]
        table = self.decompositions() if unknown else {}
        count = 0
        for node in unknown:
            if node.target in table or node.target._can_decompose():
                parts = [user for user in node.users if user.target is operator.getitem]
                retrace([node, *sorted(parts)], table=table)
                count += 1
        return PassResult(count)


@dataclass(frozen=True)
class FoldNumbers:
    """Replace every unsupported operator that computes a scalar from constants by that scalar.

    Before: `y = erf_inv(sub(full([], 1.9), 1))`
    After:  `y = full([], 1.163...)`

    Attributes:
        known: Operators to leave as they are.
        value_at: Returns a tensor of the graph's module by its path; None for one that may change.
    """

    known: Collection[Any]
    value_at: Callable[[str], Tensor | None]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Replace them in place, in a graph whose nodes all have their traced values."""
        numbers: dict[fx.Node, Tensor | None] = {}
        count = 0
        for node in list(graph.nodes):
            if not isinstance(node.target, OpOverload) or node.target in self.known:
                continue
            number = self._number(node, numbers)
            if number is not None:
                node.target, node.args = torch.ops.aten.full.default, (list(number.shape), number.item())
                node.kwargs = {"dtype": number.dtype}
                count += 1
        return PassResult(count)

    def _number(self, node: fx.Node, numbers: dict[fx.Node, Tensor | None]) -> Tensor | None:
        """The scalar value of a node that depends on constants only; None for any other node."""
        if node not in numbers:
            numbers[node] = self._computed(node, numbers)
        return numbers[node]

    def _computed(self, node: fx.Node, numbers: dict[fx.Node, Tensor | None]) -> Tensor | None:
        noted = node.meta.get("val")
        if not isinstance(noted, Tensor) or any(expression(size) != 1 for size in noted.shape):
            return None
        if node.op == "get_attr":
            return self.value_at(str(node.target))
        if not isinstance(node.target, OpOverload) or is_mutable(node.target):
            return None
        values = {source: self._number(source, numbers) for source in node.all_input_nodes}
        if torch.Tag.nondeterministic_seeded in node.target.tags or any(number is None for number in values.values()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        result = node.target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None
