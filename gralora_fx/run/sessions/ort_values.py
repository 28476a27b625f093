"""ONNX Runtime values as arrays without a copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from gralora_fx.base.compat.onnx_messages import TensorProto
from gralora_fx.base.tensors import is_tensor
from gralora_fx.errors import ExportError, GraloraError, ServingError, first_line
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.input_names import IDS, beside_ids

if TYPE_CHECKING:
    from torch import Tensor

_ALIKE = ("float16", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NAMES = {"float": "float32", "double": "float64", **{name: name for name in _ALIKE}}  # dtype names of numpy and torch
DTYPES = {f"tensor({name})": np.dtype(other) for name, other in _NAMES.items()}
_BFLOAT16 = "tensor(bfloat16)"
# dtypes of arrays that hold a cache: bfloat16 as its bits, which numpy copies much faster than ml_dtypes' numbers
STORED_DTYPES = {_BFLOAT16: np.dtype(np.uint16), **DTYPES}
_KINDS = {"i": "iu", "u": "iu", "f": "iuf", "b": "biu"}  # array kinds that are cast to an input kind


def run_values(
    session: Any,
    feed: Mapping[str, Any],
    description: str,
    names: Sequence[str] | None = None,
    error: type[GraloraError] = ExportError,
) -> dict[str, Any]:
    """Run a session on arrays or tensors, cast to its input dtypes, or on its own output values."""
    kinds = {value.name: value.type for value in (*session.get_inputs(), *optional_arguments(session))}
    if unknown := [name for name in feed if name not in kinds]:
        raise error(f"{description}: the session takes no {', '.join(unknown)}")
    values = {
        name: as_value(value, kinds[name]) if isinstance(value, np.ndarray) or is_tensor(value) else value
        for name, value in feed.items()
    }
    names = [value.name for value in session.get_outputs()] if names is None else names
    try:
        results = session.run_with_ort_values(names, values)
    except Exception as failure:  # ONNX Runtime raises types of its own
        raise error(f"ONNX Runtime fails on {description}: {first_line(failure)}") from failure
    return dict(zip(names, results, strict=True))


def run_arrays(session: Any, feed: Mapping[str, NDArray[Any]], description: str) -> dict[str, NDArray[Any]]:
    """Run a session on arrays of its input dtypes; return its outputs by name."""
    names = [value.name for value in session.get_outputs()]
    try:
        results = session.run(names, dict(feed))
    except Exception as failure:  # ONNX Runtime raises types of its own
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        raise ServingError(f"ONNX Runtime fails on {description}, {shapes}: {first_line(failure)}") from failure
    return dict(zip(names, results, strict=True))


def optional_arguments(session: Any) -> list[Any]:
    """Return a decoder session's inputs beside ids that text alone does not need (see `beside_ids`)."""
    optional: list[Any] = getattr(session, "get_overridable_initializers", list)()
    known = beside_ids([IDS, *(value.name for value in optional)])
    return [value for value in optional if value.name in known]


def as_value(given: NDArray[Any] | Tensor, kind: str) -> Any:
    """Return an array or a tensor as an `OrtValue` for a session, without a copy if it has the session's dtype."""
    array = _stored(given, kind)
    if kind == _BFLOAT16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)


def own_value(given: NDArray[Any] | Tensor, kind: str) -> Any:
    """Copy an array or a tensor into a new `OrtValue`, like a session's output; not for bfloat16."""
    array = _stored(given, kind)
    value = OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype)
    value.update_inplace(array)
    return value


def _stored(given: NDArray[Any] | Tensor, kind: str) -> NDArray[Any]:
    """Convert an array or a tensor to one of `STORED_DTYPES`, whose elements are contiguous."""
    if is_tensor(given):
        import torch

        tensor = given.detach().to(torch.bfloat16 if kind == _BFLOAT16 else getattr(torch, DTYPES[kind].name))
        tensor = tensor.contiguous()
        found: NDArray[Any] = (tensor.view(torch.uint16) if kind == _BFLOAT16 else tensor).numpy()
        return found
    if kind == _BFLOAT16 and given.dtype != np.uint16:
        given = given.astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.ascontiguousarray(given, STORED_DTYPES[kind]).reshape(given.shape)


def empty_values(session: Any, batch: int, length: int = 0) -> dict[str, Any]:
    """Return an empty cache for a session: every `past_key_values.N...` input, states zeros."""
    return {
        # untouched pages of numpy's zeros take no memory
        value.name: as_value(
            np.zeros(slot.kind.shape(value.shape, batch, length), STORED_DTYPES[value.type]), value.type
        )
        for slot, value in past_slots(session.get_inputs()).items()
    }


class _Memory:
    """The bytes of an `OrtValue`, which numpy reads in place; an array of them keeps the value alive."""

    def __init__(self, value: Any) -> None:
        self.value = value
        size = 2 * math.prod(value.shape())
        self.__array_interface__ = {"data": (value.data_ptr(), False), "shape": (size,), "typestr": "|u1", "version": 3}


def array_of(value: Any) -> NDArray[Any]:
    """Return an `OrtValue` as an array sharing its memory; bfloat16 as ml_dtypes' numbers."""
    if value.element_type() != TensorProto.BFLOAT16:  # which numpy lacks
        found: NDArray[Any] = value.numpy()
        return found
    shape, dtype = value.shape(), np.dtype(ml_dtypes.bfloat16)
    return np.asarray(_Memory(value)).view(dtype).reshape(shape) if math.prod(shape) else np.empty(shape, dtype)


def as_tensor(value: Any) -> Tensor:
    """Return an `OrtValue` as a tensor sharing its memory (an array's memory if `as_value` made it)."""
    from torch.utils.dlpack import from_dlpack

    tensor: Tensor = from_dlpack(value)
    return tensor


def as_array(name: str, value: Any, expected: Any) -> NDArray[Any]:
    """Convert an input to an array of the type and shape that a session takes."""
    array = plain_array(name, value)
    dtype = DTYPES.get(expected.type, array.dtype)
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
    """Convert a value to an array of any type and shape."""
    try:
        if not is_tensor(value):
            return np.asarray(value)
        tensor = value.detach().cpu()
        lacks = str(tensor.dtype) in ("torch.bfloat16", "torch.float8_e4m3fn")  # dtypes that numpy lacks
        return np.asarray((tensor.float() if lacks else tensor).numpy())
    except Exception as error:  # array-likes and tensors without values raise what they like
        hint = "pad its rows to one length" if isinstance(value, Sequence) else "give an array, a tensor or a list"
        raise ServingError(f"input {name!r} is not an array ({first_line(error)}); {hint}") from error
