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
    """Define the operator that stands for another one in a trace.

    Args:
        schema: Its schema, with the arguments of `operator`.
        rule: Takes tensors without values, and gives one of the shape and dtype of the result.
        operator: The overload of the operator that it stands for.

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
    """Whether a tensor has a shape and no values, as those of a model that is being traced."""
    return isinstance(tensor, FakeTensor)


def operator_for(operator: Any, tensor: Tensor) -> Any:
    """What to call with a tensor: what stands for an operator if the tensor has no values, else the operator itself."""
    return _shape_only.get(operator, operator) if is_shape_only(tensor) else operator


def restore_operators(graph: fx.Graph) -> None:
    """Put every operator in the place of the one that stood for it.

    Before: `y = gralora_shapes.linear(x, weight, bias); z = gralora_shapes.attention(y, ...)`
    After:  `y = aten.linear(x, weight, bias); z = gralora.attention(y, ...)`

    Args:
        graph: A fresh trace; it is changed in place.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _stands_for.get(node.target, node.target)
