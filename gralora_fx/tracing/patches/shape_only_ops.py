"""Shape-only operators for linear layers and concatenations in a trace.

What is traced calls the operators of `operators.linear_and_cat` in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gralora_fx.operators.linear_and_cat import CAT, LINEAR
from gralora_fx.operators.namespace import is_shape_only

_linear, _cat = nn.functional.linear, torch.cat


def _traced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_shape_only(input) or weight.ndim != 2:
        return _linear(input, weight, bias)
    result: Tensor = LINEAR(input, weight, bias)
    return result


def _traced_cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    parts = list(tensors)
    plain = not options and all(map(is_shape_only, parts))
    if not plain or len({(part.ndim, part.dtype) for part in parts}) != 1 or parts[0].ndim < 2:
        return _cat(parts, dim, **options)
    result: Tensor = CAT(parts, dim % parts[0].ndim)
    return result


@contextmanager
def shape_only_ops() -> Iterator[None]:
    """Let code traced within the block call the shape-only operators; real tensors are computed as usual."""
    with patch.object(nn.functional, "linear", _traced_linear), patch.object(torch, "cat", _traced_cat):
        yield
