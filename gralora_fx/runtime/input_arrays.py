"""Values that callers give as arrays for a session, checked against what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, first_line

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(bool)": np.dtype(np.bool_),
}
_KINDS = {"i": "iu", "u": "iu", "f": "iuf", "b": "biu"}  # array kinds that are cast to an input kind


def as_array(name: str, value: Any, expected: Any) -> NDArray[Any]:
    """An input as an array of the type and shape that a session takes.

    Args:
        name: The input.
        value: An array, a tensor on any device or a nested list.
        expected: The session's description of the input.

    Raises:
        ServingError: It is empty, or of another dtype or shape.
    """
    array = plain_array(name, value)
    dtype = _DTYPES.get(expected.type, array.dtype)
    shape = list(expected.shape)
    fixed = [(axis, size) for axis, size in enumerate(shape) if isinstance(size, int)]
    if array.dtype.kind not in "biuf":
        raise ServingError(f"input {name!r} is {array.dtype}, but the model takes {dtype}")
    if array.ndim != len(shape) or any(array.shape[axis] != size for axis, size in fixed):
        raise ServingError(f"input {name!r} has shape {list(array.shape)}, but the model takes {shape}")
    if any(size == 0 and not str(axis).startswith("past_") for axis, size in zip(shape, array.shape, strict=True)):
        raise ServingError(f"input {name!r} is empty, of shape {list(array.shape)}; give at least one of {shape}")
    allowed = _KINDS.get(dtype.kind, dtype.kind) + ("b" if name.endswith("mask") else "")
    if array.dtype.kind not in allowed:
        raise ServingError(f"input {name!r} is {array.dtype}, but the model takes {dtype}")
    if dtype.kind in "iu" and array.size and not np.can_cast(array.dtype, dtype):
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(array.min()) < least or int(array.max()) > most:
            wrong = array.min() if int(array.min()) < least else array.max()
            raise ServingError(f"input {name!r} holds {wrong}, which {dtype} does not hold")
    return np.asarray(array, dtype=dtype, order="C")


def plain_array(name: str, value: Any) -> NDArray[Any]:
    """A value as an array of any type and shape.

    Args:
        name: The input.
        value: An array, a tensor on any device or a nested list.

    Raises:
        ServingError: It is not an array.
    """
    try:
        if not isinstance(value, torch.Tensor):
            return np.asarray(value)
        tensor = value.detach().cpu()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor).numpy()
    except Exception as error:  # array-likes and tensors without values raise what they like
        hint = "pad its rows to one length" if isinstance(value, Sequence) else "give an array, a tensor or a list"
        raise ServingError(f"input {name!r} is not an array ({first_line(error)}); {hint}") from error
