"""The namespaces of this project's operators: those that compute, and those that stand for them in a trace.

While a model is traced only shapes matter, and working out a shape by running an operator on tensors without values
takes most of the time. So a model that is traced calls operators of the namespace `gralora_shapes`, which give a tensor
of the right shape and nothing else; `restore_operators` puts the operators that they stand for in the finished graph.
Which one is called depends on the tensors alone: beside a trace, in this thread or in another, tensors that have values
are computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.compat.operators import FakeTensor

NAMESPACE = "gralora"
_SHAPES = "gralora_shapes"

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_shapes: Any = torch.library.Library(_SHAPES, "DEF")  # type: ignore[no-untyped-call]
_restored: dict[Any, Any] = {}


def define_shape_only(schema: str, rule: Callable[..., Tensor], operator: Any) -> None:
    """Define the operator that stands for another one in a trace.

    Args:
        schema: Its schema, with the arguments of `operator`.
        rule: Takes tensors without values, and gives one of the shape and dtype of the result.
        operator: The overload of the operator that it stands for.
    """
    _shapes.define(schema)
    name = schema.partition("(")[0]
    _shapes.impl(name, rule, "CompositeImplicitAutograd")
    _restored[getattr(getattr(torch.ops, _SHAPES), name).default] = operator


def is_shape_only(tensor: object) -> bool:
    """Whether a tensor has a shape and no values, as those of a model that is being traced."""
    return isinstance(tensor, FakeTensor)


def operators_for(tensor: Tensor) -> Any:
    """The namespace whose operators fit a tensor: the one that gives shapes if it has no values, else the other."""
    return getattr(torch.ops, _SHAPES if is_shape_only(tensor) else NAMESPACE)


def restore_operators(graph: fx.Graph) -> None:
    """Put every operator in the place of the one that stood for it.

    Before: `y = gralora_shapes.linear(x, weight, bias); z = gralora_shapes.attention(y, ...)`
    After:  `y = aten.linear(x, weight, bias); z = gralora.attention(y, ...)`

    Args:
        graph: A fresh trace; it is changed in place.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _restored.get(node.target, node.target)
