"""Linear layers and concatenations of a trace as operators that give their shape alone.

PyTorch finds the shape of a linear layer by running the four operators that it is made of on tensors without values,
and that of a concatenation by comparing all symbolic sizes: together a third of the time of a decoder's trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gralora_fx.operators.call import define_shape_only, is_shape_only

_linear, _cat = nn.functional.linear, torch.cat


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The shape of `x @ weight.T + bias`."""
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _cat_shape(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """The shape of a concatenation; the tracer is told that the other sizes are equal."""
    first, *others = tensors
    sizes = list(first.shape)
    for other in others:
        for axis, size in enumerate(other.shape):
            if axis == dim:
                sizes[axis] = sizes[axis] + size
            elif sizes[axis] is not size:
                torch._check(sizes[axis] == size)  # type: ignore[no-untyped-call]
    return first.new_empty(sizes)


_LINEAR = define_shape_only(
    "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _linear_shape, torch.ops.aten.linear.default
)
_CAT = define_shape_only("cat(Tensor[] tensors, int dim) -> Tensor", _cat_shape, torch.ops.aten.cat.default)


def _traced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_shape_only(input) or weight.ndim != 2:
        return _linear(input, weight, bias)
    result: Tensor = _LINEAR(input, weight, bias)
    return result


def _traced_cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    parts = list(tensors)
    plain = not options and all(map(is_shape_only, parts))
    if not plain or len({(part.ndim, part.dtype) for part in parts}) != 1 or parts[0].ndim < 2:
        return _cat(parts, dim, **options)
    result: Tensor = _CAT(parts, dim % parts[0].ndim)
    return result


@contextmanager
def shape_only_ops() -> Iterator[None]:
    """Let code traced within the block call the shape-only operators; real tensors are computed as usual."""
    with patch.object(nn.functional, "linear", _traced_linear), patch.object(torch, "cat", _traced_cat):
        yield
