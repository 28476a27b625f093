"""`create_app`: the service as an ASGI app."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import ExitStack, asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from gralora_fx.base.features import parts
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot
from gralora_fx.service.adapter_store.adapter_versions import RootFiles
from gralora_fx.service.adapter_store.store import load_given
from gralora_fx.service.engines import EncoderEngine, Engine, TextEngine, open_engine
from gralora_fx.service.error_responses import add_handlers
from gralora_fx.service.metrics import GatewayMetrics, Metrics
from gralora_fx.service.middleware import add_middleware
from gralora_fx.service.openapi import DescribedApp
from gralora_fx.service.protocols.inference.routes import inference_routes, server_routes
from gralora_fx.service.protocols.openai.completions import completion_routes
from gralora_fx.service.protocols.openai.encoders import encoder_routes
from gralora_fx.service.protocols.openai.models import adapter_routes, model_routes
from gralora_fx.service.protocols.openai.responses import response_routes
from gralora_fx.service.protocols.openai.text_requests import QuestionReader
from gralora_fx.service.service_routes import health_routes, info_routes, page_routes, service_info
from gralora_fx.service.spans import SpanMiddleware, Tracing, tracing_of_environment

_logger = logging.getLogger("uvicorn.error")  # which says what else happens at the start


def create_app(settings: ServiceSettings) -> FastAPI:
    """Open an export, run it once, and make the app that serves it.

    The app answers while its lifespan runs. When that ends, requests that were taken are answered first.

    Args:
        settings: What to serve.

    Raises:
        ServingError: The export or an adapter cannot be opened, or the environment asks for an exporter of traces that
            is not there.
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
        texts = encoder_routes(engine)
        _include(texts, _feature_routes(engine, engine.encoder.outputs))
    else:
        assert isinstance(engine, TextEngine)
        texts = _text_routes(engine) if engine.takes_text else _feature_routes(engine, {engine.manifest.task or ""})
    app.include_router(texts)
    if texts.routes:
        metrics.measure_tokens(generated=isinstance(engine, TextEngine))
    if isinstance(engine, EncoderEngine):
        app.include_router(inference_routes(engine))


def _feature_routes(engine: Engine, signs: Collection[str]) -> APIRouter:
    """Return the routes that features add for a model, of which its task or its outputs are signs."""
    router = APIRouter()
    for routes in parts("routes", signs):
        _include(router, routes(engine))
    return router


def _include(router: APIRouter, other: APIRouter) -> None:
    """Add another router's routes, if it has any, so that a router without routes stays one."""
    if other.routes:
        router.include_router(other)


def _text_routes(engine: TextEngine) -> APIRouter:
    """The routes of texts, which share the threads that compile forms of answers."""
    questions, router = QuestionReader(engine), APIRouter()
    router.include_router(completion_routes(engine, questions))
    router.include_router(response_routes(engine, questions))
    return router
