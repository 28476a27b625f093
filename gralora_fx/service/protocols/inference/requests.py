"""Requests of the protocol: parsing tensors given as JSON or as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import numpy as np
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from gralora_fx.errors import ServingError, an, first_line, listed, shown
from gralora_fx.run.sessions.ort_values import DTYPES

_KINDS = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}  # kinds of JSON numbers that each kind of tensor accepts
_TYPES: dict[str, set[type]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}}
_PREFIXES = {"f": "FP", "i": "INT", "u": "UINT"}  # of types in the protocol, before their bits
_AXES, _SIZE = 64, 2**48  # numpy's maximum of axes, and more values than any body holds


@dataclass(frozen=True)
class Datatype:
    """A tensor data type."""

    name: str  # the protocol's name
    dtype: np.dtype[Any]  # numpy's dtype, little-endian like the protocol's bytes


def _datatype(dtype: np.dtype[Any]) -> Datatype:
    name = "BOOL" if dtype.kind == "b" else f"{_PREFIXES[dtype.kind]}{8 * dtype.itemsize}"
    return Datatype(name, dtype.newbyteorder("<"))


_DATATYPES = {kind: _datatype(dtype) for kind, dtype in DTYPES.items()}  # by ONNX Runtime's name


def datatype_of(value: Any) -> Datatype:
    """Return the data type of a session's input or output."""
    datatype = _DATATYPES.get(value.type)
    if datatype is None:
        raise ServingError(f"{value.name!r} is {an(value.type)}, which the Open Inference Protocol does not have")
    return datatype


def described(value: Any) -> dict[str, Any]:
    """Describe a session's input or output in the protocol's form; -1 is a dynamic size."""
    shape = [size if isinstance(size, int) else -1 for size in value.shape]
    return {"name": value.name, "datatype": datatype_of(value).name, "shape": shape}


def from_json(name: str, data: list[Any], shape: list[int], datatype: Datatype) -> NDArray[Any]:
    """Build a tensor from flat or nested lists of numbers."""
    kind = datatype.dtype.kind
    wrong = ServingError(f"the data of {name!r} is not of {datatype.name}; give numbers of that type alone")
    if not _types_of(data) <= _TYPES[kind]:  # numpy would allocate the longest text's size for every element
        raise wrong
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ServingError(f"the data of {name!r} is not a tensor ({first_line(error)})") from error
    if values.dtype.kind not in _KINDS[kind] and values.size:  # integers out of range
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
    """Build a tensor from row-major bytes; floats may be infinite or NaN."""
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
    """Return a tensor as row-major bytes."""
    return array.astype(datatype.dtype, copy=False).tobytes()


def to_numbers(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Flatten a tensor for JSON; raise if it is not finite."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ServingError(f"output {name!r} is not finite for these inputs; ask for it as binary data")
    return np.ascontiguousarray(array).ravel()


def _shaped(name: str, array: NDArray[Any], shape: list[int]) -> NDArray[Any]:
    try:
        return array.reshape(shape)
    except ValueError as error:  # too many axes, or an empty tensor with one that is too long
        raise ServingError(f"input {name!r} cannot have shape {shown(shape)} ({first_line(error)})") from error


def _count(name: str, shape: list[int]) -> int:
    """Return the number of elements of a shape; -1 if a size is negative."""
    if len(shape) > _AXES or any(size > _SIZE for size in shape):
        raise ServingError(f"input {name!r} cannot have shape {shown(shape)}")
    return -1 if any(size < 0 for size in shape) else prod(shape)


def _types_of(data: list[Any]) -> set[type]:
    """Return the types of the values in nested lists."""
    types = set(map(type, data))
    if list not in types:
        return types
    inner = (_types_of(value) for value in data if isinstance(value, list))
    return types.difference((list,)).union(*inner)


_PROBLEMS = 1000  # maximum number of described problems
HEADER_LENGTH = "Inference-Header-Content-Length"


class _Object(BaseModel):
    """An object of the protocol; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class InputParameters(_Object):
    """Parameters of an input."""

    binary_data_size: Annotated[
        Any,  # `_announced` checks it, since its error names the input and counts the bytes
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}),
        Field(description="Its bytes behind the JSON object."),
    ] = None


class InputTensor(_Object):
    """An input, with its values in `data` or its bytes after the JSON object."""

    name: str
    shape: Annotated[list[int], Field(fail_fast=True)]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(_Object):
    """Parameters of a requested output."""

    binary_data: Annotated[
        bool | None,
        Field(description="Whether to give it as bytes behind the JSON object; by default as binary_data_output says."),
    ] = None


class RequestedOutput(_Object):
    """A requested output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferParameters(_Object):
    """Parameters of a request."""

    binary_data_output: Annotated[
        bool, Field(description="Whether outputs are binary that do not say so themselves.")
    ] = False


class InferRequest(_Object):
    """A request of `infer`."""

    id: str | None = None
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[InputTensor], Field(fail_fast=True)]
    outputs: Annotated[list[RequestedOutput], Field(fail_fast=True)] | None = None


@dataclass(frozen=True)
class Inference:
    """A parsed inference request."""

    arrays: Mapping[str, NDArray[Any]]  # inputs by name
    wanted: Mapping[str, bool]  # requested outputs, and whether each is returned as bytes
    id: str | None  # the request's id


def read_inference(
    body: bytes, header_length: str | None, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> Inference:
    """Parse and check a request."""
    length = len(body) if header_length is None else _length(header_length, len(body))
    request = _parsed(memoryview(body)[:length].tobytes(), header_length)
    binary = memoryview(body)[length:]
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise ServingError(f"input {shown(tensor.name)} is given twice; give it once")
        datatype = _taken(tensor, inputs)
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise ServingError(f"input {tensor.name!r} needs either data or binary_data_size")
        if tensor.data is not None:
            arrays[tensor.name] = from_json(tensor.name, tensor.data, tensor.shape, datatype)
            continue
        data, binary = _announced(tensor.name, size, binary)
        arrays[tensor.name] = from_bytes(tensor.name, data, tensor.shape, datatype)
    if binary:
        raise ServingError(
            f"{len(body) - length} bytes follow the JSON object, and {len(binary)} of them belong to no input; give "
            "each input its binary_data_size"
        )
    return Inference(arrays, _wanted(request, outputs), request.id)


def _parsed(head: bytes, header_length: str | None) -> InferRequest:
    """Parse the JSON object of a request."""
    try:
        return InferRequest.model_validate_json(head)
    except ValidationError as error:
        if (count := error.error_count()) > _PROBLEMS:  # descriptions of millions would fill the memory
            raise ServingError(
                f"{count} fields of the request are wrong or not supported; correct them, or leave them out"
            ) from None
        problems = error.errors(include_url=False, include_input=False)
        if problems[0]["type"] == "json_invalid" and header_length is not None:
            raise ServingError(
                f"the first {len(head)} bytes of the body are not a JSON object ({problems[0]['ctx']['error']}), and "
                f"{HEADER_LENGTH} says that they are; it is the length of that object alone"
            ) from error
        raise RequestValidationError(problems) from error


def _announced(name: str, size: Any, binary: memoryview) -> tuple[memoryview, memoryview]:
    """Split off the bytes of one input; raise unless `size` is a number of bytes that are left."""
    if type(size) is not int or size < 0:
        raise ServingError(
            f"the binary_data_size of input {name!r} is {shown(size)}; it is a whole number of bytes, and "
            f"{len(binary)} are there for it"
        )
    if size > len(binary):
        raise ServingError(
            f"input {name!r} announces {shown(size)} bytes by binary_data_size, and {len(binary)} are there for it "
            f"behind the JSON object, whose length {HEADER_LENGTH} says"
        )
    return binary[:size], binary[size:]


def _length(header: str, size: int) -> int:
    if not (header.isascii() and header.isdecimal() and len(header) < 20 and int(header) <= size):
        raise ServingError(
            f"{HEADER_LENGTH} is {shown(header)}; it is the length of the JSON object, at most {size} here"
        )
    return int(header)


def _taken(tensor: InputTensor, inputs: Mapping[str, Any]) -> Datatype:
    """Return the data type of an input; raise if the model has no such input or another type."""
    value = inputs.get(tensor.name)
    if value is None:
        raise ServingError(f"no input {shown(tensor.name)}; the model takes {listed(inputs)}")
    datatype = datatype_of(value)
    if tensor.datatype != datatype.name:
        raise ServingError(f"input {tensor.name!r} is {shown(tensor.datatype)}, but the model takes {datatype.name}")
    return datatype


def _wanted(request: InferRequest, outputs: Mapping[str, Any]) -> dict[str, bool]:
    """Return the requested outputs and whether each is binary; all outputs if none is named."""
    is_binary = request.parameters.binary_data_output
    if not request.outputs:
        return dict.fromkeys(outputs, is_binary)
    asked = {output.name: output.parameters.binary_data for output in request.outputs}
    wanted = {name: is_binary if own is None else own for name, own in asked.items()}
    if unknown := [name for name in wanted if name not in outputs]:
        raise ServingError(f"no output {shown(unknown[0])}; there is {listed(outputs)}")
    if len(wanted) < len(request.outputs):
        raise ServingError("an output is asked for twice; ask for it once")
    return wanted
