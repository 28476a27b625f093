"""`create_app`: the service as an ASGI app, and its OpenAPI description."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool

from gralora_fx.base.features import parts
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot
from gralora_fx.service.adapter_store.adapter_versions import RootFiles
from gralora_fx.service.adapter_store.store import load_given
from gralora_fx.service.engines import EncoderEngine, Engine, TextEngine, open_engine
from gralora_fx.service.error_responses import add_handlers, embeddings_form, is_inference
from gralora_fx.service.metrics import GatewayMetrics, Metrics
from gralora_fx.service.middleware import add_middleware
from gralora_fx.service.protocols.inference.requests import HEADER_LENGTH, InferRequest
from gralora_fx.service.protocols.inference.routes import inference_routes, server_routes
from gralora_fx.service.protocols.openai.completions import completion_routes
from gralora_fx.service.protocols.openai.encoders import encoder_routes
from gralora_fx.service.protocols.openai.models import adapter_routes, model_routes
from gralora_fx.service.protocols.openai.responses import response_routes
from gralora_fx.service.protocols.openai.text_requests import QuestionReader
from gralora_fx.service.service_routes import OPEN_PATHS, health_routes, info_routes, page_routes, service_info
from gralora_fx.service.spans import SpanMiddleware, Tracing, tracing_of_environment

_logger = logging.getLogger("uvicorn.error")  # uvicorn's log of the start


def create_app(settings: ServiceSettings) -> FastAPI:
    """Open an export, run it once, and return the ASGI app that serves it.

    The app serves during its lifespan; at the end, requests in progress are answered first.

    Args:
        settings: What to serve.

    Raises:
        ServingError: The export or an adapter cannot be opened, or the environment names a trace exporter that is
            not installed.
        GraloraError: An adapter that PEFT saved cannot be converted (see `export_adapter`).
        ConfigError: The adapter root is not a directory.
    """
    metrics, tracing = Metrics(), tracing_of_environment()
    root = None if settings.adapter_root is None else AdapterRoot.of(settings.adapter_root)
    engine = open_engine(settings, metrics)
    with ExitStack() as stack:
        stack.callback(engine.models.close)
        app = _app(settings, engine, metrics, root, tracing)
        stack.pop_all()  # the end of the app's lifespan closes them
    return app


def _app(
    settings: ServiceSettings, engine: Engine, metrics: Metrics, root: AdapterRoot | None, tracing: Tracing | None
) -> FastAPI:
    models = engine.models
    load_given(models, settings)
    if root is not None:
        models.files, models.pending.most = RootFiles(root, settings.directory), settings.max_queue
    metrics.watch_adapters(models)
    metrics.now.register(GatewayMetrics(engine.models, engine.queue))
    info = service_info(settings, engine)
    metrics.describe(info.labels(), lambda: engine.queue.waiting)
    if isinstance(engine, TextEngine):
        metrics.measure_memory(engine.queue.memory)
    if isinstance(engine, TextEngine) and engine.queue.prefix_cache is not None:
        metrics.measure_prefixes(engine.queue.prefix_cache)
    if isinstance(engine, TextEngine) and engine.queue.proposes:
        metrics.measure_proposed()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.queue.start()
        for note in engine.notes:
            _logger.info(note)
        app.state.is_ready = True
        if tracing is not None:
            _logger.info("requests are traced by OpenTelemetry, to %s", tracing.exporters)
        yield
        app.state.is_ready = False
        await run_in_threadpool(engine.stop)
        if tracing is not None:
            await run_in_threadpool(tracing.close)

    app = DescribedApp(title="gralora-fx", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.engine, app.state.timeout, app.state.is_ready = engine, settings.timeout, False
    app.state.metrics = metrics
    app.state.asks_for_key = settings.api_key is not None
    add_handlers(app)
    add_middleware(app, settings, metrics)
    if tracing is not None:
        app.add_middleware(SpanMiddleware, tracer=tracing.tracer)
    _add_routes(app, engine, metrics)
    app.include_router(adapter_routes(None if root is None else models, metrics))
    app.include_router(info_routes(info))
    app.include_router(page_routes())
    return app


def _add_routes(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    async def is_ready() -> bool:
        return bool(app.state.is_ready)

    app.include_router(health_routes(is_ready))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def measured() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(model_routes(engine.models))
    app.include_router(server_routes(engine.models))
    if isinstance(engine, EncoderEngine):
        from gralora_fx.service.protocols.tei.routes import classifier_routes  # of encoders alone

        texts = encoder_routes(engine)
        _include(texts, classifier_routes(engine))
        _include(texts, _feature_routes(engine, engine.encoder.outputs))
    else:
        assert isinstance(engine, TextEngine)
        has_text = engine.takes_text or engine.attached
        texts = _text_routes(engine) if has_text else _feature_routes(engine, {engine.manifest.task or ""})
    app.include_router(texts)
    if texts.routes:
        metrics.measure_tokens(generated=isinstance(engine, TextEngine))
    if isinstance(engine, EncoderEngine):
        app.include_router(inference_routes(engine))


def _feature_routes(engine: Engine, signs: Collection[str]) -> APIRouter:
    """Return the routes that features add for this model's task or outputs."""
    router = APIRouter()
    for routes in parts("routes", signs):
        _include(router, routes(engine))
    return router


def _include(router: APIRouter, other: APIRouter) -> None:
    """Include another router unless it is empty, so that a router without routes stays one."""
    if other.routes:
        router.include_router(other)


def _text_routes(engine: TextEngine) -> APIRouter:
    """Return the routes for text; they share the threads that compile constraints on answers."""
    questions, router = QuestionReader(engine), APIRouter()
    router.include_router(completion_routes(engine, questions))
    router.include_router(response_routes(engine, questions))
    return router


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
    """Fields of an error."""

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


class EmbeddingsError(BaseModel):
    """An error in the form of Text Embeddings Inference."""

    error: str
    error_type: Literal["validation", "tokenizer", "overloaded", "backend", "unhealthy"]


class DescribedApp(FastAPI):
    """A FastAPI app whose OpenAPI description lists the errors that it answers with."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI description, built once."""
        if self.openapi_schema is None:
            description = super().openapi()
            schemas = description.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own error form, which is not used
                schemas.pop(name, None)
            modes = [(model, "validation") for model in (Error, InferenceError, EmbeddingsError, InferRequest)]
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
    has_form = embeddings_form(path)
    models: list[type[BaseModel]] = [InferenceError] if is_inference(path) else []
    models = models or [EmbeddingsError] * (has_form is not False) + [Error] * (not has_form)
    schemas = [{"$ref": _SCHEMAS + model.__name__} for model in models]
    content = {_JSON: {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    for status, meaning in sorted(errors.items()):
        responses.setdefault(str(status), {"description": meaning, "content": content})


def _add_bodies(path: str, method: str, operation: dict[str, Any]) -> None:
    """Describe binary tensors of `infer`, and streamed answers."""
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
