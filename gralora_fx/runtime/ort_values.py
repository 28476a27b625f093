"""ONNX Runtime sessions run on tensors of any dtype, since numpy has no bfloat16."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from onnxruntime import OrtValue
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gralora_fx.errors import ExportError, GraloraError, first_line

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def run_values(
    session: Any,
    feed: Mapping[str, Any],
    description: str,
    names: Sequence[str] | None = None,
    error: type[GraloraError] = ExportError,
) -> dict[str, Any]:
    """Run a session on tensors, which are cast to its input dtypes, or on its own output values.

    Args:
        session: An ONNX Runtime session.
        feed: A tensor or an `OrtValue` for every input.
        description: What is being run, for messages.
        names: Outputs to return; None for all.
        error: The error type to raise.

    Returns:
        Outputs by name, as `OrtValue`; `as_tensor` makes tensors of them.

    Raises:
        GraloraError: Of the given type: ONNX Runtime fails.
    """
    kinds = {value.name: value.type for value in session.get_inputs()}
    if unknown := [name for name in feed if name not in kinds]:
        raise error(f"{description}: the session takes no {', '.join(unknown)}")
    values = {
        name: as_value(value, kinds[name]) if isinstance(value, Tensor) else value for name, value in feed.items()
    }
    names = [value.name for value in session.get_outputs()] if names is None else names
    try:
        results = session.run_with_ort_values(names, values)
    except Exception as failure:  # ONNX Runtime raises types of its own
        raise error(f"ONNX Runtime fails on {description}: {first_line(failure)}") from failure
    return dict(zip(names, results, strict=True))


def as_value(tensor: Tensor, kind: str) -> Any:
    """A tensor as an `OrtValue` for a session.

    Args:
        tensor: Any tensor on the CPU.
        kind: The input's type in ONNX Runtime's words, such as `tensor(float16)`.
    """
    name = _element(kind)
    array = tensor.detach().to(_DTYPES[name]).contiguous()
    if array.dtype == torch.bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(torch.uint16).numpy(), TensorProto.BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array.numpy())


def own_value(tensor: Tensor, kind: str) -> Any:
    """A tensor as an `OrtValue` in memory of its own, like a session's output; not of bfloat16.

    Args:
        tensor: Any tensor on the CPU.
        kind: The type in ONNX Runtime's words.
    """
    array = tensor.detach().to(_DTYPES[_element(kind)]).contiguous().numpy()
    value = OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype)
    value.update_inplace(array)
    return value


def empty_values(session: Any, batch: int, length: int = 0) -> dict[str, Any]:
    """An empty cache for every `past_key_values.N.key|value` input of a session.

    Args:
        session: An ONNX Runtime session.
        batch: Number of rows.
        length: Positions that it has room for, zeros.
    """
    values: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            shape, dtype = (batch, value.shape[1], length, value.shape[3]), _DTYPES[_element(value.type)]
            # pages of numpy's that nobody has read or written yet take no memory, where torch writes its zeros
            count = math.prod(shape)
            zeros = np.zeros(max(count, 1) * dtype.itemsize, np.uint8)
            values[value.name] = as_value(torch.from_numpy(zeros).view(dtype)[:count].reshape(shape), value.type)
    return values


def as_tensor(value: Any) -> Tensor:
    """An `OrtValue` as a tensor of the same dtype and memory, which is that of an array if `as_value` made it."""
    tensor: Tensor = from_dlpack(value)
    return tensor


def _element(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")")
