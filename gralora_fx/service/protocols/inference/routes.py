"""Routes of the Open Inference Protocol, version 2, with Triton's extension for binary tensors."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from gralora_fx.errors import shown
from gralora_fx.run.generate.request_errors import UnknownModelError
from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.encoder import Encoder
from gralora_fx.service.engines import EncoderEngine
from gralora_fx.service.example_inputs import example_inputs
from gralora_fx.service.protocols.inference.requests import (
    HEADER_LENGTH,
    Inference,
    InferRequest,
    datatype_of,
    described,
    read_inference,
    to_bytes,
    to_numbers,
)
from gralora_fx.service.replies import timeout_of, unless_disconnected
from gralora_fx.service.spans import note_model

_VERSION = "1"
_LARGE = 2**16  # bytes of a body from which it is parsed in another thread


class ServerMetadata(BaseModel):
    """Name, version and extensions of the server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """An input or output; -1 is a dynamic size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """Inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Readiness of a model."""

    name: str
    ready: bool


class OutputTensor(BaseModel):
    """An output, with its values in `data` or its bytes after the JSON object."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float | int | bool] | None = None


class InferResponse(BaseModel):
    """The outputs of a model."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


def server_routes(models: AdapterStore) -> APIRouter:
    """Return the routes of the protocol that every service has."""
    router = APIRouter(prefix="/v2")

    async def server() -> ServerMetadata:
        version = importlib.metadata.version("gralora-fx")
        return ServerMetadata(name="gralora-fx", version=version, extensions=["binary_tensor_data"])

    router.get("", response_model=ServerMetadata)(server)
    router.get("/", response_model=ServerMetadata, include_in_schema=False)(server)

    async def ready(name: str, version: str = _VERSION) -> ModelReady:
        _check_model(models, name, version)
        return ModelReady(name=name, ready=True)

    _add(router.get, "/ready", ready, ModelReady)
    return router


def inference_routes(engine: EncoderEngine) -> APIRouter:
    """Return the routes of a model that runs once per request."""
    router, encoder, models = APIRouter(prefix="/v2"), engine.encoder, engine.models
    inputs = [TensorMetadata(**described(value)) for value in encoder.inputs.values()]
    outputs = [TensorMetadata(**described(value)) for value in encoder.outputs.values()]

    async def metadata(name: str, version: str = _VERSION) -> ModelMetadata:
        _check_model(models, name, version)
        return ModelMetadata(
            name=name, versions=[_VERSION], platform="onnxruntime_onnx", inputs=inputs, outputs=outputs
        )

    async def infer(request: Request, name: str, version: str = _VERSION) -> Response:
        _check_model(models, name, version)
        body, length = await request.body(), request.headers.get(HEADER_LENGTH)
        if len(body) > _LARGE:
            asked = await run_in_threadpool(read_inference, body, length, encoder.inputs, encoder.outputs)
        else:
            asked = read_inference(body, length, encoder.inputs, encoder.outputs)
        begun = time.monotonic()
        async with models.use(name, timeout_of(request)) as adapter:
            note_model(request.scope, name, adapter)
            return await unless_disconnected(request, partial(_infer, encoder, name, adapter, asked), begun)

    async def example(name: str, version: str = _VERSION) -> Response:
        """Return an example request that `infer` accepts as it is."""
        _check_model(models, name, version)
        arrays = await run_in_threadpool(example_inputs, encoder)
        tensors = [
            {**described(encoder.inputs[name]), "shape": list(array.shape), "data": np.ascontiguousarray(array).ravel()}
            for name, array in arrays.items()
        ]
        return Response(
            orjson.dumps({"inputs": tensors}, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )

    _add(router.get, "", metadata, ModelMetadata)
    _add(router.get, "/example", example, InferRequest)
    _add(router.post, "/infer", infer, InferResponse)
    return router


def _add(method: Callable[..., Any], path: str, endpoint: Callable[..., Any], model: type[BaseModel]) -> None:
    """Add a model's endpoint, with and without a version in the path."""
    for prefix in ("/models/{name}", "/models/{name}/versions/{version}"):
        method(f"{prefix}{path}", response_model=model, response_model_exclude_none=True)(endpoint)


def _check_model(models: AdapterStore, name: str, version: str) -> None:
    """Raise unless there is a model of this name and version."""
    models.check(name)
    if version != _VERSION:
        raise UnknownModelError(f"no version {shown(version)} of model {name!r}; there is {_VERSION}")


async def _infer(encoder: Encoder, name: str, adapter: str | None, asked: Inference) -> Response:
    results = await encoder.tensors(asked.arrays, adapter)
    outputs, binary = [], []
    for output, is_binary in asked.wanted.items():
        array, datatype = results[output], datatype_of(encoder.outputs[output])
        fields: dict[str, Any] = {"name": output, "datatype": datatype.name, "shape": list(array.shape)}
        if is_binary:
            binary.append(to_bytes(array, datatype))
            fields["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            fields["data"] = to_numbers(output, array)
        outputs.append(fields)
    identity = {} if asked.id is None else {"id": asked.id}
    body = {"model_name": name, "model_version": _VERSION, **identity, "outputs": outputs}
    head = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return Response(head, media_type="application/json")
    length = {HEADER_LENGTH: str(len(head))}
    return Response(b"".join([head, *binary]), media_type="application/octet-stream", headers=length)
