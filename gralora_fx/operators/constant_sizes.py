"""`gralora::reshape` and `gralora::slice`: PyTorch's own with every size and limit a number, as ONNX can hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gralora_fx.operators.call import Call
from gralora_fx.operators.namespace import define


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape.

    Args:
        x: Any tensor.
        shape: The new sizes; 0 for one that stays as it is, and at most one -1 for what is left.
    """
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


@dataclass(frozen=True)
class Reshape(Call):
    """A call of `gralora::reshape`; `reshape` describes the arguments."""

    target: ClassVar[Any] = define("reshape(Tensor x, int[] shape) -> Tensor", reshape)

    x: fx.Node
    shape: Sequence[int]


def slice_axis(x: Tensor, axis: int, start: int, stop: int, step: int) -> Tensor:
    """`x[..., start:stop:step]` along an axis."""
    return torch.ops.aten.slice.Tensor(x, axis, start, stop, step)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Slice(Call):
    """A call of `gralora::slice`; `slice_axis` describes the arguments."""

    target: ClassVar[Any] = define("slice(Tensor x, int axis, int start, int stop, int step) -> Tensor", slice_axis)

    x: fx.Node
    axis: int
    start: int
    stop: int
    step: int
