"""What stands for PyTorch's own linear layer and concatenation in a trace, and gives their shape alone.

PyTorch finds the shape of a linear layer by running the four operators that it is made of on tensors without values,
and that of a concatenation by comparing all symbolic sizes: together a third of the time of a decoder's trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gralora_fx.operators.namespace import define_shape_only


def linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The shape-only counterpart of `x @ weight.T + bias`."""
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def cat_shape(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """The shape-only counterpart of `cat`; the tracer is told that the other sizes are equal."""
    first, *others = tensors
    sizes = list(first.shape)
    for other in others:
        for axis, size in enumerate(other.shape):
            if axis == dim:
                sizes[axis] = sizes[axis] + size
            elif sizes[axis] is not size:
                torch._check(sizes[axis] == size)  # type: ignore[no-untyped-call]
    return first.new_empty(sizes)


LINEAR = define_shape_only(
    "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", linear_shape, torch.ops.aten.linear.default
)
CAT = define_shape_only("cat(Tensor[] tensors, int dim) -> Tensor", cat_shape, torch.ops.aten.cat.default)
