"""The namespaces of this project's operators: those that compute, and their shape-only counterparts for traces.

While a model is traced only shapes matter, and computing them by running operators on fake tensors takes most of the
time. So a traced model calls operators of the namespace `gralora_shapes`, which return a tensor of the right shape and
nothing else; `restore_aten` replaces them by the real operators in the finished graph. Which one is called depends on
the tensors alone: during a trace, in this thread or another, tensors that have values are computed as usual.
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
_stands_for: dict[Any, Any] = {}  # operators that compute, by the one that stands for each in a trace
_shape_only: dict[Any, Any] = {}  # the other way round


def define(
    schema: str,
    reference: Callable[..., Tensor],
    *,
    shape: Callable[..., Tensor] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """Define an operator of the namespace `gralora`.

    PyTorch takes its gradients, its shape of fake tensors and its decomposition from the reference.

    Args:
        schema: Its name, arguments and result, as PyTorch writes them.
        reference: What it computes, by PyTorch's own operators; takes the schema's arguments.
        shape: Takes the same, and gives a tensor of the shape and dtype of the result, without values: for what a model
            calls while it is traced. None for what only passes put into a graph.
        tags: PyTorch's tags, such as of operators that draw random numbers.

    Returns:
        The operator, as the target of a graph's node.
    """
    _library.define(schema, tags=tags)
    name = schema.partition("(")[0]
    _library.impl(name, reference, "CompositeImplicitAutograd")
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if shape is not None:
        define_shape_only(schema, shape, operator)
    return operator


def define_shape_only(schema: str, rule: Callable[..., Tensor], operator: Any) -> Any:
    """Define the shape-only counterpart of an operator.

    Args:
        schema: Its schema, with the arguments of `operator`.
        rule: Takes fake tensors, and returns one with the shape and dtype of the result.
        operator: The overload that it replaces in a trace.

    Returns:
        The operator of the namespace `gralora_shapes`.
    """
    _shapes.define(schema)
    name = schema.partition("(")[0]
    _shapes.impl(name, rule, "CompositeImplicitAutograd")
    shape_only = getattr(getattr(torch.ops, _SHAPES), name).default
    _stands_for[shape_only] = operator
    _shape_only[operator] = shape_only
    return shape_only


def is_shape_only(tensor: object) -> bool:
    """Whether a tensor is fake, as those of a model that is being traced."""
    return isinstance(tensor, FakeTensor)


def operator_for(operator: Any, tensor: Tensor) -> Any:
    """What to call with a tensor: what stands for an operator if the tensor has no values, else the operator itself."""
    return _shape_only.get(operator, operator) if is_shape_only(tensor) else operator


def restore_aten(graph: fx.Graph) -> None:
    """Replace shape-only operators by the operators they stand for.

    Before: `y = gralora_shapes.linear(x, weight, bias); z = gralora_shapes.attention(y, ...)`
    After:  `y = aten.linear(x, weight, bias); z = gralora.attention(y, ...)`

    Args:
        graph: A fresh trace; it is changed in place.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _stands_for.get(node.target, node.target)
