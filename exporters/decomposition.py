"""Operators without an ONNX form as the smaller operators that PyTorch makes them of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

from gralora_fx.exporters.retracing import retrace


def decompose(graph: fx.Graph, known: Collection[Any], table: Mapping[Any, Callable[..., Any]]) -> int:
    """Replace every operator that is not known by what PyTorch computes it with; the rest of the graph stays.

    Before: `y = square(x)`
    After:  `y = pow(x, 2)`

    An operator that is of no others stays too.

    Args:
        graph: A traced graph, every node with the value that tracing noted; it is changed in place.
        known: Operators to leave as they are.
        table: Decompositions of operators that PyTorch does not take apart by itself.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for node in list(graph.nodes):
        is_operator = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if is_operator and node.target not in known and (node.target in table or node.target._can_decompose()):
            parts = [user for user in node.users if user.target is operator.getitem]
            retrace([node, *sorted(parts)], table=table)
            replaced += 1
    return replaced
