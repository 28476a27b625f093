"""Adapter tensors as arrays, of bfloat16 too, which numpy lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": _BFLOAT16}

Arrays = Mapping[str, NDArray[Any]]


def as_ort_value(array: NDArray[Any]) -> Any:
    """An array as an `OrtValue`, of bfloat16 too."""
    if array.dtype == _BFLOAT16:
        raw = np.ascontiguousarray(array).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def cast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array in one of the dtypes of adapter tensors."""
    found: NDArray[Any] = array.astype(DTYPES[dtype])
    return found


def as_arrays(values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """`OrtValue`s by name as arrays, of bfloat16 too."""
    return {name: _array(value) for name, value in values.items()}


def _array(value: Any) -> NDArray[Any]:
    if value.element_type() == TensorProto.BFLOAT16:  # which numpy lacks
        import torch

        from gralora_fx.runtime.ort_values import as_tensor

        raw: NDArray[Any] = as_tensor(value).view(torch.uint16).numpy()
        half: NDArray[Any] = raw.view(_BFLOAT16).copy()
        return half
    found: NDArray[Any] = np.array(value.numpy())
    return found
