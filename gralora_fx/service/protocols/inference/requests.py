"""Requests of the Open Inference Protocol: a JSON object, and behind it the bytes of its binary tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.service.protocols.inference.tensors import Datatype, datatype_of, from_bytes, from_json

_PROBLEMS = 1000  # that are described
HEADER_LENGTH = "Inference-Header-Content-Length"


class _Object(BaseModel):
    """An object of the protocol, whose fields are all known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class InputParameters(_Object):
    """Parameters of an input."""

    binary_data_size: Annotated[
        Any,  # `_announced` checks it, since its error names the input and counts the bytes
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}),
        Field(description="Its bytes behind the JSON object."),
    ] = None


class InputTensor(_Object):
    """An input: with `data`, or with its bytes behind the JSON object."""

    name: str
    shape: Annotated[list[int], Field(fail_fast=True)]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(_Object):
    """Parameters of an output that is asked for."""

    binary_data: Annotated[
        bool | None,
        Field(description="Whether to give it as bytes behind the JSON object; by default as binary_data_output says."),
    ] = None


class RequestedOutput(_Object):
    """An output that is asked for."""

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
    """What a request asks for.

    Attributes:
        arrays: The inputs.
        wanted: The outputs, and whether each is given as bytes.
        id: The request's id.
    """

    arrays: Mapping[str, NDArray[Any]]
    wanted: Mapping[str, bool]
    id: str | None


def read_inference(
    body: bytes, header_length: str | None, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> Inference:
    """A request, checked."""
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
    """The JSON object of a request."""
    try:
        return InferRequest.model_validate_json(head)
    except ValidationError as error:
        if (count := error.error_count()) > _PROBLEMS:  # of millions, the descriptions would fill the memory
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
    """The bytes of an input, and those that are left for others.

    Raises:
        ServingError: It is not a number of bytes, or there are not as many.
    """
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
    """The type of an input that the model takes."""
    value = inputs.get(tensor.name)
    if value is None:
        raise ServingError(f"no input {shown(tensor.name)}; the model takes {listed(inputs)}")
    datatype = datatype_of(value)
    if tensor.datatype != datatype.name:
        raise ServingError(f"input {tensor.name!r} is {shown(tensor.datatype)}, but the model takes {datatype.name}")
    return datatype


def _wanted(request: InferRequest, outputs: Mapping[str, Any]) -> dict[str, bool]:
    """The outputs that are asked for, and whether each is binary; all of them where none is named."""
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
