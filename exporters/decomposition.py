"""Operators without an ONNX form as the smaller operators that PyTorch makes them of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

from gralora_fx.exporters.retracing import retrace

Table = Mapping[Any, Callable[..., Any]]


def decompose(graph: fx.Graph, known: Collection[Any], decompositions: Callable[[], Table]) -> int:
    """Replace every operator that is not known by what PyTorch computes it with; the rest of the graph stays.

    Before: `y = square(x)`
    After:  `y = pow(x, 2)`

    An operator that is of no others stays too.

    Args:
        graph: A traced graph, every node with the value that tracing noted; it is changed in place.
        known: Operators to leave as they are.
        decompositions: Gives those that PyTorch does not apply by itself; called where an operator is not known.

    Returns:
        How many were replaced.
    """
    calls = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    unknown = [node for node in calls if node.target not in known]
    table = decompositions() if unknown else {}
    replaced = 0
    for node in unknown:
        if node.target in table or node.target._can_decompose():
            parts = [user for user in node.users if user.target is operator.getitem]
            retrace([node, *sorted(parts)], table=table)
            replaced += 1
    return replaced
