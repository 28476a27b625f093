"""Errors as responses: OpenAI's JSON error object, or that of another protocol on its paths."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gralora_fx.errors import GraloraError, shown
from gralora_fx.run.engine.cache_memory import NeverRoomError, NoRoomError
from gralora_fx.run.generate.request_errors import (
    AdapterNotFoundError,
    AdaptersInUseError,
    AnswerError,
    DeadlineError,
    QueueFullError,
    RunError,
    StoppedError,
    TooManyChangesError,
    UnknownAdapterError,
    UnknownModelError,
)
from gralora_fx.service.metrics import note_rejection

FAILED = "the request failed; the server's log says why"
_RETRY_AFTER = {"Retry-After": "1"}
# OpenAI's client asks again after 504 too, though the answer would take as long
_NO_RETRY = {"X-Should-Retry": "false"}
_HEADERS = {429: _RETRY_AFTER, 503: _RETRY_AFTER, 504: _NO_RETRY}
_INFERENCE = "/v2"
# Text Embeddings Inference's paths, and its types of errors by status; one that it shares has errors in the form of
# the request
_EMBEDDINGS, _SHARED = ("/embed", "/predict"), "/rerank"
_EMBEDDING_TYPES = {422: "tokenizer", 429: "overloaded", 500: "backend", 503: "unhealthy", 504: "overloaded"}
_FORM = "gralora_fx.error_form"
_ONE_ADAPTER = (
    "a request names one adapter, as its model; a weighted sum of several is an adapter of its own, which "
    "mix_adapters makes in Python"
)
_UNREADABLE = "There was an error parsing the body"  # FastAPI's words
# the union member that a problem belongs to, which pydantic puts between names of fields
_KIND = re.compile(r"[A-Z]\w*|str|int|float|bool|(list|dict|tagged-union|constrained|function-|literal|nullable)\b.*")
_logger = logging.getLogger(__name__)
_STATUS: tuple[tuple[type[GraloraError], int], ...] = (
    (UnknownModelError, 404),
    (UnknownAdapterError, 404),
    (AdapterNotFoundError, 404),
    (TooManyChangesError, 429),
    (AdaptersInUseError, 429),
    (QueueFullError, 429),
    (StoppedError, 503),
    (NoRoomError, 503),
    (AnswerError, 400),
    (RunError, 500),
    (DeadlineError, 504),
)
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


def status_of(error: GraloraError) -> int:
    """Return an error's HTTP status; 400 unless its class has one."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 400)


def error_body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}


def is_inference(path: str) -> bool:
    """Return whether a path belongs to the Open Inference Protocol."""
    return path == _INFERENCE or path.startswith(f"{_INFERENCE}/")


def embeddings_form(path: str) -> bool | None:
    """Return whether errors of a path have Text Embeddings Inference's form; None if the request decides it."""
    return None if path == _SHARED else path in _EMBEDDINGS


def note_embeddings_form(scope: Any) -> None:
    """Record that errors of a request have Text Embeddings Inference's form."""
    scope[_FORM] = _EMBEDDINGS[0]


def error_response(
    path: str, status: int, message: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error response in the form of the path's protocol."""
    body = {"error": message} if is_inference(path) else error_body(status, message, field)
    if embeddings_form(path):
        body = {"error": message, "error_type": _EMBEDDING_TYPES.get(status, "validation")}
    added = _HEADERS.get(status, {})
    return JSONResponse(body, status, headers={**added, **(headers or {})})


def add_handlers(app: FastAPI) -> None:
    """Register handlers that answer every error in its protocol's form."""

    @app.exception_handler(GraloraError)
    async def _refused(request: Request, error: GraloraError) -> JSONResponse:
        note_rejection(request.scope, error)
        response = error_response(_form(request), status_of(error), str(error), error.field)
        if isinstance(error, NeverRoomError):
            del response.headers["Retry-After"]
            response.headers.update(_NO_RETRY)
        return response

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        field, message = _first_problem(request, error)
        if request.url.path == _SHARED and isinstance(error.body, dict) and "texts" in error.body:
            note_embeddings_form(request.scope)
        return error_response(_form(request), 400, message, field)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        text = _described(request, error)
        return error_response(_form(request), error.status_code, text, headers=error.headers)

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> JSONResponse:
        _logger.error("a request failed", exc_info=error)
        return error_response(_form(request), 500, FAILED)


def _form(request: Request) -> str:
    """Return the path in whose form to report an error."""
    return str(request.scope.get(_FORM, request.url.path))


def _described(request: Request, error: HTTPException) -> str:
    """Reword an error of the framework, whose own text only repeats the status."""
    path = shown(request.url.path)
    if error.status_code == 404 and error.detail == "Not Found":
        return f"there is no {path} here; /openapi.json lists the paths of this export"
    if error.status_code == 405:
        return f"{path} does not take {request.method}; /openapi.json lists what it takes"
    if error.status_code == 400 and error.detail == _UNREADABLE:
        return "the body cannot be read: it is not text in UTF-8, or JSON that is nested too deeply"
    return str(error.detail)


def _first_problem(request: Request, error: RequestValidationError) -> tuple[str | None, str]:
    """Return the field and text of the most specific validation error, since a union reports one error per member."""
    problem = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    is_field = problem["type"] == "extra_forbidden"
    loc = [part for part in problem["loc"] if part != "body"]
    kept = loc[-1:] if is_field else []
    parts = [part for part in loc[: len(loc) - len(kept)] if not _KIND.fullmatch(str(part))] + kept
    if problem["type"] == "json_invalid":
        return None, f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}"
    if not loc:
        return None, _body_problem(request, problem)
    field = ".".join(shown(part)[1:-1] if isinstance(part, str) else str(part) for part in parts)
    if field == "model" and problem["type"] == "string_type" and isinstance(problem["input"], (dict, list)):
        return field, f"model is not a name: {_ONE_ADAPTER}"
    if is_field and field in ("adapter", "adapters"):
        return field, f"{field} is not supported: {_ONE_ADAPTER}"
    if is_field:
        return field, f"{field} is not supported; leave it out"
    if problem["type"] == "missing":
        return field, f"{field} is missing or null; give it"
    return field, f"{field}: {problem['msg']}"


def _body_problem(request: Request, problem: Mapping[str, Any]) -> str:
    """Describe an error about the body as a whole."""
    if problem["type"] == "missing":
        return "the body is missing; give a JSON object"
    if isinstance(problem.get("input"), bytes):  # FastAPI reads no JSON then
        content_type = request.headers.get("content-type")
        kind = "is missing" if content_type is None else f"is {shown(content_type)}"
        return f"the header Content-Type {kind}; send the body as application/json"
    return "the body is JSON, but not an object; give one"
