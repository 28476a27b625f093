"""Tensors of the Open Inference Protocol, as JSON and as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, first_line, shown
from gralora_fx.run.sessions.ort_values import DTYPES

_KINDS = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}  # kinds of numbers in JSON that a kind of tensor takes
_TYPES: dict[str, set[type]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}}
_PREFIXES = {"f": "FP", "i": "INT", "u": "UINT"}  # of types in the protocol, before their bits
_AXES, _SIZE = 64, 2**48  # the most axes that numpy has, and more values than any body holds


@dataclass(frozen=True)
class Datatype:
    """A type of numbers.

    Attributes:
        name: The protocol's name.
        dtype: Numpy's type, little-endian as the protocol's bytes.
    """

    name: str
    dtype: np.dtype[Any]


def _datatype(dtype: np.dtype[Any]) -> Datatype:
    name = "BOOL" if dtype.kind == "b" else f"{_PREFIXES[dtype.kind]}{8 * dtype.itemsize}"
    return Datatype(name, dtype.newbyteorder("<"))


_DATATYPES = {kind: _datatype(dtype) for kind, dtype in DTYPES.items()}  # by ONNX Runtime's name


def datatype_of(value: Any) -> Datatype:
    """The type of an input or output of a session."""
    datatype = _DATATYPES.get(value.type)
    if datatype is None:
        raise ServingError(f"{value.name!r} is a {value.type}, which the Open Inference Protocol cannot be served with")
    return datatype


def described(value: Any) -> dict[str, Any]:
    """An input or output of a session, in the protocol's form; -1 is any size."""
    shape = [size if isinstance(size, int) else -1 for size in value.shape]
    return {"name": value.name, "datatype": datatype_of(value).name, "shape": shape}


def from_json(name: str, data: list[Any], shape: list[int], datatype: Datatype) -> NDArray[Any]:
    """A tensor from numbers, flat or nested."""
    kind = datatype.dtype.kind
    wrong = ServingError(f"the data of {name!r} is not of {datatype.name}; give numbers of that type alone")
    if not _types_of(data) <= _TYPES[kind]:  # numpy would make room for the longest text at every place
        raise wrong
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ServingError(f"the data of {name!r} is not a tensor ({first_line(error)})") from error
    if values.dtype.kind not in _KINDS[kind] and values.size:  # whole numbers that are too large
        raise wrong
    if values.size != _count(name, shape):
        raise ServingError(f"input {name!r} has {values.size} values, not those of shape {shown(shape)}")
    if values.ndim > 1 and list(values.shape) != shape:
        raise ServingError(f"the data of {name!r} has shape {list(values.shape)}, not {shown(shape)}")
    with np.errstate(over="ignore"):
        array = _shaped(name, values.astype(datatype.dtype), shape)
    is_kept = np.isfinite(array).all() if array.dtype.kind == "f" else np.array_equal(array.ravel(), values.ravel())
    if not is_kept:
        raise ServingError(
            f"the data of {name!r} has values that {datatype.name} does not hold, or that are not finite"
        )
    return array


def from_bytes(name: str, data: memoryview, shape: list[int], datatype: Datatype) -> NDArray[Any]:
    """Make a tensor of bytes, row by row; floats may be infinite or not a number."""
    count = _count(name, shape)
    size = count * datatype.dtype.itemsize
    if len(data) != size:
        needed = "which no tensor has" if count < 0 else f"which are {shown(size)}"
        raise ServingError(
            f"input {name!r} has {len(data)} bytes, not those of {datatype.name} in shape {shown(shape)}, {needed}"
        )
    if datatype.dtype.kind == "b" and np.any(np.frombuffer(data, np.uint8) > 1):
        raise ServingError(f"input {name!r} holds bytes other than 0 and 1, which {datatype.name} does not have")
    array = np.frombuffer(data, datatype.dtype).copy() if size else np.empty(0, datatype.dtype)  # writable
    return _shaped(name, array, shape)


def to_bytes(array: NDArray[Any], datatype: Datatype) -> bytes:
    """A tensor as bytes, row by row."""
    return array.astype(datatype.dtype, copy=False).tobytes()


def to_numbers(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """A tensor as a flat array for JSON."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ServingError(f"output {name!r} is not finite for these inputs; ask for it as binary data")
    return np.ascontiguousarray(array).ravel()


def _shaped(name: str, array: NDArray[Any], shape: list[int]) -> NDArray[Any]:
    try:
        return array.reshape(shape)
    except ValueError as error:  # too many axes, or an empty tensor with one that is too long
        raise ServingError(f"input {name!r} cannot have shape {shown(shape)} ({first_line(error)})") from error


def _count(name: str, shape: list[int]) -> int:
    """How many values a shape has; -1 if a size is negative."""
    if len(shape) > _AXES or any(size > _SIZE for size in shape):
        raise ServingError(f"input {name!r} cannot have shape {shown(shape)}")
    return -1 if any(size < 0 for size in shape) else prod(shape)


def _types_of(data: list[Any]) -> set[type]:
    """The types of the values in nested lists."""
    types = set(map(type, data))
    if list not in types:
        return types
    inner = (_types_of(value) for value in data if isinstance(value, list))
    return types.difference((list,)).union(*inner)
