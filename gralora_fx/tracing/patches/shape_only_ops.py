"""Linear layers and concatenations of a trace whose shapes are told directly, not worked out by PyTorch.

PyTorch finds the shape of a linear layer by running the four operators that it is made of on tensors without values,
and that of a concatenation by comparing all symbolic sizes: together a third of the time of a decoder's trace. While
tracing, operators stand for both that say their shape at once (see `namespace`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gralora_fx.operators.namespace import define_shape_only, is_shape_only, operators_for

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


define_shape_only(
    "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", linear_shape, torch.ops.aten.linear.default
)
define_shape_only("cat(Tensor[] tensors, int dim) -> Tensor", cat_shape, torch.ops.aten.cat.default)


def _traced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_shape_only(input) or weight.ndim != 2:
        return _linear(input, weight, bias)
    result: Tensor = operators_for(input).linear(input, weight, bias)
    return result


def _traced_cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    parts = list(tensors)
    plain = not options and all(map(is_shape_only, parts))
    if not plain or len({(part.ndim, part.dtype) for part in parts}) != 1 or parts[0].ndim < 2:
        return _cat(parts, dim, **options)
    result: Tensor = operators_for(parts[0]).cat(parts, dim % parts[0].ndim)
    return result


@contextmanager
def cheap_shapes() -> Iterator[None]:
    """Let what is traced while the block lasts call the operators; tensors with values are computed as ever."""
    with patch.object(nn.functional, "linear", _traced_linear), patch.object(torch, "cat", _traced_cat):
        yield
