"""Linear layers and concatenations of a trace whose shapes are told directly, not worked out by PyTorch.

PyTorch finds the shape of a linear layer by running the four operators that it is made of on tensors without values,
and that of a concatenation by comparing all symbolic sizes: together a third of the time of a decoder's trace. While
tracing, operators stand for both that say their shape at once; in the finished trace they are PyTorch's own again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from gralora_fx.tracing.namespace import NAMESPACE

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
_library.define("cat(Tensor[] tensors, int dim) -> Tensor")

_linear, _cat = nn.functional.linear, torch.cat


def linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A tensor of the shape of `x @ weight.T + bias`, without values."""
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def cat_shape(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """A tensor of the shape of some tensors joined, without values; the tracer is told that their other sizes agree."""
    first, *others = tensors
    sizes = list(first.shape)
    for other in others:
        for axis, size in enumerate(other.shape):
            if axis == dim:
                sizes[axis] = sizes[axis] + size
            elif sizes[axis] is not size:
                torch._check(sizes[axis] == size)  # type: ignore[no-untyped-call]
    return first.new_empty(sizes)


_library.impl("linear", linear_shape, "CompositeImplicitAutograd")
_library.impl("cat", cat_shape, "CompositeImplicitAutograd")

_OWN = {
    torch.ops.gralora.linear.default: torch.ops.aten.linear.default,
    torch.ops.gralora.cat.default: torch.ops.aten.cat.default,
}


def _traced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(input, FakeTensor) or weight.ndim != 2:
        return _linear(input, weight, bias)
    result: Tensor = torch.ops.gralora.linear(input, weight, bias)
    return result


def _traced_cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    parts = list(tensors)
    plain = not options and all(isinstance(part, FakeTensor) for part in parts)
    if not plain or len({(part.ndim, part.dtype) for part in parts}) != 1 or parts[0].ndim < 2:
        return _cat(parts, dim, **options)
    result: Tensor = torch.ops.gralora.cat(parts, dim % parts[0].ndim)
    return result


@contextmanager
def cheap_shapes() -> Iterator[None]:
    """Let what is traced while the block lasts call the operators; tensors with values are computed as ever."""
    with patch.object(nn.functional, "linear", _traced_linear), patch.object(torch, "cat", _traced_cat):
        yield


def as_pytorchs(graph: fx.Graph) -> None:
    """Make the operators PyTorch's own.

    Before: `y = gralora.linear(x, weight, bias); z = gralora.cat([x, y], 1)`
    After:  `y = aten.linear(x, weight, bias); z = aten.cat([x, y], 1)`

    Args:
        graph: A fresh trace; it is changed in place.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _OWN.get(node.target, node.target)
