"""The frontend of several replicas: it reads which model a request names, and lets Ray choose a replica for that.

Ray's proxy cannot read a request's body, and does not know the form of the protocols' errors.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from gralora_fx.serving.http.bodies import BodyMiddleware
from gralora_fx.serving.http.failures import add_handlers, error_body, error_response
from gralora_fx.serving.http.health import health_routes
from gralora_fx.serving.http.metrics import Metrics
from gralora_fx.serving.http.middleware import ApiKeyMiddleware
from gralora_fx.serving.http.settings import ServiceSettings
from gralora_fx.serving.scale.asgi_request import read

APPLICATION, MODEL = "gralora-fx-model", "model"  # of the replicas, for Ray
_logger = logging.getLogger(__name__)


class Frontend:
    """Takes requests from Ray's proxy, and hands each to a replica that Ray chooses, by the adapter that it names."""

    def __init__(
        self, replicas: Any, settings: ServiceSettings, adapters: tuple[str, ...], metrics_folder: Path
    ) -> None:
        """Make the app.

        Args:
            replicas: Ray's handle of the replicas.
            settings: What is served.
            adapters: The adapters that requests may name.
            metrics_folder: Where the processes of the service keep their metrics.
        """
        app = self._app = FastAPI(openapi_url=None)  # the replicas have the app's description
        add_handlers(app)
        app.add_middleware(BodyMiddleware, max_body=settings.max_body)
        if settings.api_key is not None:
            app.add_middleware(ApiKeyMiddleware, api_key=settings.api_key)
        _add_own_routes(app, metrics_folder)
        app.router.routes.append(Route("/{path:path}", _Forwarding(replicas, adapters)))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app, for Ray."""
        return self._app


def _add_own_routes(app: FastAPI, metrics_folder: Path) -> None:
    async def is_ready() -> bool:
        status = await run_in_threadpool(serve.status)
        application = status.applications.get(APPLICATION)  # none while the service ends
        states = {} if application is None else application.deployments[MODEL].replica_states
        return any(state == "RUNNING" and count for state, count in states.items())

    app.include_router(health_routes(is_ready))

    @app.get("/metrics")
    def measured() -> Response:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(metrics_folder))  # type: ignore[no-untyped-call]
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Forwarding:
    """Answers requests by a replica."""

    def __init__(self, replicas: Any, adapters: tuple[str, ...]) -> None:
        self._replicas, self._adapters = replicas.options(stream=True), frozenset(adapters)
        self._metrics = Metrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await read(Request(scope, receive))
        replicas = self._replicas
        if (model := request.model) in self._adapters:
            replicas = replicas.options(multiplexed_model_id=model)
        sender = _Sender(send)
        try:
            async for message in replicas.answer.remote(request):
                await sender.pass_on(message)
        except (RayError, RayServeException) as error:
            status, text = _described(error)
            self._metrics.answered("other", scope["method"], status)
            if sender.has_begun:
                await sender.end_with(status, text)
            else:
                await error_response(request.path, status, text)(scope, receive, send)


class _Sender:
    """Passes an answer on. Its first message is kept until the next, so that an error can still take its place.

    Attributes:
        has_begun: Whether something was sent.
    """

    def __init__(self, send: Send) -> None:
        self.has_begun = False
        self._send = send
        self._first: Message = {}

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._first = message
            return
        if not self.has_begun:
            self.has_begun = True
            await self._send(self._first)
        await self._send(message)

    async def end_with(self, status: int, text: str) -> None:
        """End a stream of events with an error; every other answer is one message."""
        event = f"data: {json.dumps(error_body(status, text))}\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _described(error: Exception) -> tuple[int, str]:
    """The status and text for an error of Ray's."""
    if isinstance(error, BackPressureError):
        return 429, "as many requests wait as there is room for; try again"
    if isinstance(error, RayActorError):
        return 503, "the replica that ran the request has ended; try again"
    if isinstance(error, DeploymentUnavailableError):
        return 503, "no replica takes requests; try again"
    _logger.error("a request failed", exc_info=error)
    return 500, "the request failed; the server's log says why"
