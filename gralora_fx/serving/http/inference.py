"""The Open Inference Protocol, version 2, with tensors as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gralora_fx.errors import ServingError, first_line, listed, shown
from gralora_fx.serving.http.disconnects import unless_disconnected
from gralora_fx.serving.http.encoder import Encoder
from gralora_fx.serving.http.engines import EncoderEngine

_TYPES: dict[str, tuple[str, type[np.generic]]] = {  # ONNX Runtime's name: the protocol's, and numpy's
    "tensor(float)": ("FP32", np.float32),
    "tensor(double)": ("FP64", np.float64),
    "tensor(float16)": ("FP16", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(bool)": ("BOOL", np.bool_),
}


class _Object(BaseModel):
    """An object of the protocol, whose fields are all known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TensorIn(_Object):
    """An input."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class OutputName(_Object):
    """An output that is asked for."""

    name: str


class InferRequest(_Object):
    """A request of `infer`."""

    id: str | None = None
    inputs: list[TensorIn]
    outputs: list[OutputName] | None = None


def inference_routes(engine: EncoderEngine) -> APIRouter:
    """The routes of a model that is run once for each request."""
    router, encoder, names = APIRouter(prefix="/v2/models"), engine.encoder, engine.names

    @router.get("/{name}")
    async def metadata(name: str) -> dict[str, Any]:
        names.adapter(name)
        return {
            "name": name,
            "versions": [],
            "platform": "onnxruntime_onnx",
            "inputs": [_described(value) for value in encoder.inputs.values()],
            "outputs": [_described(value) for value in encoder.outputs.values()],
        }

    @router.get("/{name}/ready")
    async def ready(name: str) -> dict[str, Any]:
        names.adapter(name)
        return {"name": name, "ready": True}

    @router.post("/{name}/infer")
    async def infer(name: str, asked: InferRequest, request: Request) -> Response:
        names.adapter(name)
        arrays = {tensor.name: _array(encoder, tensor) for tensor in asked.inputs}
        if len(arrays) < len(asked.inputs):
            raise ServingError("an input is given twice; give each once")
        wanted = list(encoder.outputs) if asked.outputs is None else [output.name for output in asked.outputs]
        if unknown := [output for output in wanted if output not in encoder.outputs]:
            raise ServingError(f"no output {shown(unknown[0])}; there is {listed(encoder.outputs)}")
        with names.held(name) as adapter:
            return await unless_disconnected(request, _infer(encoder, name, adapter, arrays, wanted, asked.id))

    return router


async def _infer(
    encoder: Encoder,
    name: str,
    adapter: str | None,
    arrays: dict[str, NDArray[Any]],
    wanted: list[str],
    request_id: str | None,
) -> Response:
    outputs = await encoder.tensors(arrays, adapter)
    found = [_tensor(output, outputs[output], encoder.outputs[output].type) for output in wanted]
    given = {} if request_id is None else {"id": request_id}
    return JSONResponse({"model_name": name, **given, "outputs": found})


def _described(value: Any) -> dict[str, Any]:
    """An input or output of a session, in the protocol's form; -1 is any size."""
    shape = [size if isinstance(size, int) else -1 for size in value.shape]
    return {"name": value.name, "datatype": _datatype(value.type)[0], "shape": shape}


def _datatype(kind: str) -> tuple[str, type[np.generic]]:
    if kind not in _TYPES:
        raise ServingError(f"the model has a tensor of {kind}, which is not served")
    return _TYPES[kind]


def _array(encoder: Encoder, tensor: TensorIn) -> NDArray[Any]:
    """An input as an array.

    Raises:
        ServingError: The model has no such input, it has another type, or the data is not of the type and shape.
    """
    value = encoder.inputs.get(tensor.name)
    if value is None:
        raise ServingError(f"no input {shown(tensor.name)}; the model takes {listed(encoder.inputs)}")
    datatype, dtype = _datatype(value.type)
    if tensor.datatype != datatype:
        raise ServingError(f"input {tensor.name!r} is {shown(tensor.datatype)}, but the model takes {datatype}")
    try:
        found = np.asarray(tensor.data)
    except (ValueError, OverflowError) as error:
        raise ServingError(f"the data of {tensor.name!r} is not a tensor ({first_line(error)})") from error
    kinds = {"f": "iuf", "i": "iu", "b": "b"}[np.dtype(dtype).kind]
    is_mixed = kinds != "b" and _has_flags(tensor.data)
    if is_mixed or (found.dtype.kind not in kinds and found.size):
        raise ServingError(f"the data of {tensor.name!r} is not of {datatype}; give numbers of that type alone")
    if any(size < 0 for size in tensor.shape) or found.size != np.prod(tensor.shape, dtype=object):
        raise ServingError(f"input {tensor.name!r} has {found.size} values, not those of shape {shown(tensor.shape)}")
    if found.ndim > 1 and list(found.shape) != tensor.shape:
        raise ServingError(f"the data of {tensor.name!r} has shape {list(found.shape)}, not {shown(tensor.shape)}")
    with np.errstate(over="ignore"):
        array = found.astype(dtype).reshape(tensor.shape)
    is_kept = np.isfinite(array).all() if array.dtype.kind == "f" else np.array_equal(array.ravel(), found.ravel())
    if not is_kept:
        raise ServingError(
            f"the data of {tensor.name!r} has values that {datatype} does not hold, or that are not finite"
        )
    return np.asarray(array)


def _has_flags(data: list[Any]) -> bool:
    """Whether true or false is among some values, which numpy would count as 1 and 0."""
    return any(_has_flags(value) if isinstance(value, list) else isinstance(value, bool) for value in data)


def _tensor(name: str, array: NDArray[Any], kind: str) -> dict[str, Any]:
    """An output in the protocol's form.

    Raises:
        ServingError: It has values for which JSON has no number.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ServingError(f"output {name!r} is not finite for these inputs")
    return {"name": name, "datatype": _datatype(kind)[0], "shape": list(array.shape), "data": array.ravel().tolist()}
