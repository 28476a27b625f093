"""The tensors of a layer in few bits, and the checks of their dtypes, shapes and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor

Parts = Mapping[str, StoredTensor]  # a layer's tensors, by the last part of their keys
CODES = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


class DamagedError(Exception):
    """A stored weight is damaged; the message says how."""


def part_of(parts: Parts, name: str) -> StoredTensor:
    """Return a tensor of a layer."""
    if name not in parts:
        raise DamagedError(f"{name} is missing")
    return parts[name]


def check(tensor: StoredTensor, dtype: str, shape: tuple[int, ...]) -> None:
    """Check a tensor's dtype and shape."""
    part = tensor.key.rpartition(".")[2]
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise DamagedError(
            f"{part} is {tensor.dtype} of shape {list(tensor.shape)}, and has to be {dtype} of shape {list(shape)}"
        )


def check_matrix(tensor: StoredTensor) -> None:
    """Check that a tensor is a matrix of any values."""
    if len(tensor.shape) != 2 or not tensor.numel:
        raise DamagedError(f"{tensor.key.rpartition('.')[2]} has shape {list(tensor.shape)}, not that of a matrix")


def check_order(order: StoredTensor, count: int) -> None:
    """Check that the inputs' group indices are below `count`."""
    groups = array_of(order)
    if groups.min() < 0 or groups.max() >= count:
        part = order.key.rpartition(".")[2]
        raise DamagedError(f"{part} names groups {groups.min()} to {groups.max()}, of {count}")


def has_order(parts: Parts) -> bool:
    """Return whether a compressed-tensors layer records the group of each input; -1 stands for none."""
    order = parts.get("weight_g_idx")
    return order is not None and (order.dtype != "I32" or not order.numel or bool((array_of(order) != -1).any()))


def check_scales(scales: StoredTensor, shape: tuple[int, ...]) -> None:
    """Check that scales are finite floats of a shape."""
    part = scales.key.rpartition(".")[2]
    if scales.dtype not in FLOATS or scales.shape != shape:
        raise DamagedError(
            f"{part} is {scales.dtype} of shape {list(scales.shape)}, and has to be floats {list(shape)}"
        )
    if not np.isfinite(scales.array().astype(np.float32)).all():
        raise DamagedError(f"{part} is not finite")


def array_of(tensor: StoredTensor) -> NDArray[Any]:
    """Return a stored tensor of integers or FP8."""
    values = np.empty(tensor.shape, CODES[tensor.dtype])
    tensor.read_into(values)
    return values
