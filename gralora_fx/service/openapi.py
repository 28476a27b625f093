"""The service's description of itself as OpenAPI: with its errors, and with bodies that aren't JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gralora_fx.service.error_responses import is_inference
from gralora_fx.service.protocols.inference.requests import HEADER_LENGTH, InferRequest
from gralora_fx.service.service_routes import OPEN_PATHS

_SCHEMAS = "#/components/schemas/"
_JSON, _BYTES, _EVENTS = "application/json", "application/octet-stream", "text/event-stream"
_KEY = "key"
_ALWAYS = {
    401: "The API key is missing or wrong.",
    408: "The request did not arrive in time.",
    431: "The head of the request is too large.",
    500: "A run failed; the server's log says why.",
    503: "The service is not ready, or is stopping, or has too many connections.",
}
_NAMED = {404: "There is no such model or adapter."}
_POSTED = {
    400: "The request is wrong; the message says where.",
    413: "The body is too large.",
    415: "The body's compression is not taken.",
    429: "The queue is full.",
}


class ErrorFields(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: int


class Error(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorFields


class InferenceError(BaseModel):
    """An error in the form of the Open Inference Protocol."""

    error: str


class DescribedApp(FastAPI):
    """An app whose description names the errors that it answers."""

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is None:
            description = super().openapi()
            schemas = description.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form, which is not answered
                schemas.pop(name, None)
            modes = [(model, "validation") for model in (Error, InferenceError, InferRequest)]
            schemas |= models_json_schema(modes, ref_template=_SCHEMAS + "{model}")[1]["$defs"]  # type: ignore[arg-type]
            for path, method, operation in _operations(description):
                _add_errors(path, method, operation)
                _add_bodies(path, method, operation)
            if self.state.asks_for_key:
                description["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
                for path, _, operation in _operations(description):
                    operation["security"] = [] if path in OPEN_PATHS else [{_KEY: []}]
        return self.openapi_schema or {}


def _operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            yield path, method, operation


def _add_errors(path: str, method: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    errors = dict(_ALWAYS)
    if "{" in path or method == "post":
        errors |= _NAMED
    if method == "post":
        errors |= _POSTED
    model = InferenceError if is_inference(path) else Error
    content = {_JSON: {"schema": {"$ref": _SCHEMAS + model.__name__}}}
    for status, meaning in sorted(errors.items()):
        responses.setdefault(str(status), {"description": meaning, "content": content})


def _add_bodies(path: str, method: str, operation: dict[str, Any]) -> None:
    """Describe binary tensors of `infer`, and streams of answers."""
    answer = operation["responses"].get("200", {}).setdefault("content", {})
    if path.endswith(("completions", "/responses")):
        answer[_EVENTS] = {"schema": {"type": "string"}}
    if not (path.endswith("/infer") and method == "post"):
        return
    binary = {"schema": {"type": "string", "format": "binary"}}
    answer[_BYTES] = binary
    body = {_JSON: {"schema": {"$ref": _SCHEMAS + InferRequest.__name__}}, _BYTES: binary}
    operation["requestBody"] = {"required": True, "content": body}
    operation.setdefault("parameters", []).append(
        {
            "name": HEADER_LENGTH,
            "in": "header",
            "required": False,
            "schema": {"type": "integer", "minimum": 0},
            "description": "Bytes of the JSON object, where the bytes of tensors follow it.",
        }
    )
