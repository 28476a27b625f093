"""The frontend of several replicas: it reads the model that a request names, and lets Ray choose a replica for it.

Ray's proxy cannot read request bodies, and does not know the protocols' error forms. Metrics of the replicas are
summed here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.format.adapter_paths import is_name
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot
from gralora_fx.service.error_responses import FAILED, add_handlers, error_body, error_response
from gralora_fx.service.metrics import Metrics, mark_counted
from gralora_fx.service.middleware import AccessLogMiddleware, add_middleware
from gralora_fx.service.protocols.openai.models import adapter_routes
from gralora_fx.service.replies import END, event
from gralora_fx.service.scale.spread_adapters import SpreadChanges, read
from gralora_fx.service.service_routes import health_routes, page_routes

APPLICATION, MODEL = "gralora-fx-model", "model"  # Ray's names of the replicas
_EVENTS = "text/event-stream"
_logger = logging.getLogger(__name__)


class Frontend:
    """Takes requests from Ray's proxy, and forwards each to a replica that Ray chooses by the adapter named."""

    def __init__(
        self,
        replicas: Any,
        settings: ServiceSettings,
        adapters: tuple[str, ...],
        metrics_folder: Path,
        access_log: Path | None,
        adapters_folder: Path | None = None,
    ) -> None:
        """Make the app."""
        metrics = Metrics()
        app = self._app = FastAPI(openapi_url=None)  # the replicas have the app's description
        add_handlers(app)
        add_middleware(app, settings, metrics)
        if access_log is not None:
            app.add_middleware(AccessLogMiddleware, file=access_log.open("a", encoding="utf-8"))
        _add_own_routes(app, metrics_folder, ReplicaMetrics(replicas, metrics))
        if settings.adapter_root is not None and adapters_folder is not None:
            root = AdapterRoot.of(settings.adapter_root)
            changes = SpreadChanges(replicas, root, settings.directory, adapters_folder)
            app.include_router(adapter_routes(changes, metrics))

        def is_adapter(model: str | None) -> bool:
            if settings.adapter_root is None:
                return model in adapters
            return is_name(model) and model != settings.base_name  # the replicas find them

        app.router.routes.append(Route("/{path:path}", Forwarding(replicas, is_adapter)))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app, for Ray."""
        return self._app


def _add_own_routes(app: FastAPI, metrics_folder: Path, now: ReplicaMetrics) -> None:
    async def is_ready() -> bool:
        status = await run_in_threadpool(serve.status)
        application = status.applications.get(APPLICATION)  # none while the service ends
        states = {} if application is None else application.deployments[MODEL].replica_states
        return any(state == "RUNNING" and count for state, count in states.items())

    app.include_router(health_routes(is_ready))
    app.include_router(page_routes())

    @app.get("/metrics")
    async def measured() -> Response:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(metrics_folder))  # type: ignore[no-untyped-call]
        counted = await run_in_threadpool(generate_latest, registry)
        return Response(counted + await now.text(), media_type=CONTENT_TYPE_LATEST)


class Forwarding:
    """Forwards requests to a replica; if the replica dies first, answers with an error in the protocol's form."""

    def __init__(self, replicas: Any, is_adapter: Callable[[str | None], bool]) -> None:
        """Set the replicas."""
        self._replicas, self._is_adapter = replicas.options(stream=True), is_adapter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = await read(Request(scope, receive))
        replicas = self._replicas
        if self._is_adapter(model := request.model):
            replicas = replicas.options(multiplexed_model_id=model)
        sender = _Sender(scope, send)
        try:
            async for message in replicas.answer.remote(request):
                await sender.pass_on(message)
        except (RayError, RayServeException) as error:
            if sender.is_complete:  # the replica ended after its last message, before Ray knew that it was the last
                return
            problem = _described(error)
        else:
            if sender.is_complete:
                return
            _logger.error("a replica's answer to %s %s has no end", scope["method"], request.path)
            problem = 500, FAILED
        scope.pop("route", None)  # the catch-all route would hide the path
        if sender.has_begun:
            await sender.end_with(*problem)
        else:
            await error_response(request.path, *problem)(scope, receive, send)


class _Sender:
    """Forwards a response: event streams as they come, other responses once complete.

    Until the first message is sent, an error can still replace the response.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self.has_begun = self.is_complete = False
        self._scope, self._send = scope, send
        self._held: list[Message] = []
        self._is_stream = False

    async def pass_on(self, message: Message) -> None:
        """Forward the next message of the response."""
        self._held.append(message)
        if message["type"] == "http.response.start":
            self._is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith(_EVENTS)
            return
        is_last = not message.get("more_body", False)
        if not (is_last or self._is_stream):
            return
        mark_counted(self._scope)  # the replica has counted it
        held, self._held = self._held, []
        self.has_begun, self.is_complete = True, is_last  # also if the client has gone
        for part in held:
            await self._send(part)

    async def end_with(self, status: int, text: str) -> None:
        """End an event stream with an error event."""
        body = event(error_body(status, text)) + END
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _described(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and text for an error of Ray's."""
    if isinstance(error, BackPressureError):
        return 429, "as many requests wait as there is room for; try again"
    if isinstance(error, RayActorError):
        return 503, "the replica that ran the request has ended; try again"
    if isinstance(error, DeploymentUnavailableError):
        return 503, "no replica takes requests; try again"
    _logger.error("a request failed", exc_info=error)
    return 500, FAILED


_SHARES, _WAITING = ("vllm:kv_cache_usage_perc",), "vllm:num_requests_waiting"
_RUNNING, _NAMES = "vllm:num_requests_running", ("running_lora_adapters", "waiting_lora_adapters")


class ReplicaMetrics:
    """Collects the metrics of all replicas: sums counts, averages shares, and joins lists of names."""

    def __init__(self, replicas: Any, metrics: Metrics) -> None:
        """Set the replicas."""
        self._replicas, self._metrics = replicas, metrics

    async def text(self) -> bytes:
        """Return the metrics in Prometheus' text format; replicas that have just ended are left out."""
        try:
            answers = await self._replicas.broadcast("measured").results_async(return_exceptions=True)
        except RayServeException:  # no replica runs
            answers = []
        families: dict[str, list[Metric]] = {}
        for metric in (metric for answer in answers if not isinstance(answer, Exception) for metric in answer):
            families.setdefault(metric.name, []).append(metric)
        registry = CollectorRegistry()
        registry.register(_Given([_together(each) for each in families.values()], self._metrics.answering))
        return generate_latest(registry)


class _Given(Collector):
    """Metrics collected from replicas; requests that wait in the frontend are added."""

    def __init__(self, metrics: Sequence[Metric], answering: int) -> None:
        self._metrics, self._answering = metrics, answering

    def collect(self) -> Iterable[Metric]:
        running = sum(metric.samples[0].value for metric in self._metrics if metric.name == _RUNNING)
        for metric in self._metrics:
            if metric.name == _WAITING:
                (only,) = metric.samples
                metric.samples = [only._replace(value=max(self._answering - running, 0))]
            yield metric


def _together(metrics: Sequence[Metric]) -> Metric:
    """Merge one metric of all replicas, each with one sample or none."""
    whole, samples = metrics[0], [sample for metric in metrics for sample in metric.samples]
    if whole.type == "info" or not samples:
        return whole
    value = sum(sample.value for sample in samples)
    if whole.name in _SHARES:
        value /= len(samples)
    elif any(name in samples[0].labels for name in _NAMES):
        value = max(sample.value for sample in samples)
    whole.samples = [Sample(samples[0].name, _labels([sample.labels for sample in samples]), value)]
    return whole


def _labels(several: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Merge labels; labels that list names get each name once."""
    joined = dict(several[0])
    for label in _NAMES:
        if label in joined:
            names = {name for labels in several for name in labels[label].split(",") if name}
            joined[label] = ",".join(sorted(names))
    return joined
