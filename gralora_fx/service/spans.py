"""OpenTelemetry spans: one for each request, with children for its answers: queue, prompt, decode.

They are made if the environment names an exporter or a provider exists already; otherwise OpenTelemetry is not
imported. A route notes its answers with the request; their spans are made when the response has ended, so that no
decoder step waits for one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gralora_fx.core.config.service_settings import EXPORTER, span_exporters, warn_of_missing_spans
from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.service.scheduling.text_jobs import TextJob
from gralora_fx.service.service_routes import OPEN_PATHS

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_MODEL, _ANSWERS = "gralora_fx.model", "gralora_fx.answers"
_UNTRACED = frozenset((*OPEN_PATHS, "/metrics"))
_PROTOCOLS = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_GROUP = "opentelemetry_traces_exporter"  # entry point group of exporter packages
_MOST = 1000  # letters of a path
_OPERATIONS = {  # by route, the operation names of the generative AI conventions
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
    "/embed": "embeddings",
}


class Answers(Protocol):
    """The answers of one request."""

    jobs: list[TextJob]

    def usage(self) -> dict[str, Any]:
        """Return the tokens so far as OpenAI's `usage`."""


def note_model(scope: Any, model: str, adapter: str | None) -> None:
    """Record the model that a request names and the adapter version that runs it."""
    scope[_MODEL] = model, adapter


def note_answers(scope: Any, answers: Answers) -> None:
    """Record a request's answers."""
    scope[_ANSWERS] = answers


@dataclass(frozen=True)
class Tracing:
    """A tracer and its exporters."""

    tracer: Tracer  # makes spans
    exporters: str  # names of the exporters
    close: Callable[[], object]  # sends the remaining spans


def tracing_of_environment() -> Tracing | None:
    """Return tracing as set by OpenTelemetry's environment variables; None if they ask for none.

    A provider that exists already, as under `opentelemetry-instrument`, is used as it is.
    """
    if "opentelemetry.sdk.trace" in sys.modules:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import get_tracer_provider

        provider = get_tracer_provider()
        if isinstance(provider, TracerProvider):
            return Tracing(_tracer(provider), "the provider that is there already", provider.force_flush)
    names = span_exporters()
    if not names or warn_of_missing_spans():
        return None
    provider = _provider(names)
    return Tracing(_tracer(provider), ", ".join(names), provider.shutdown)


def _tracer(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("gralora_fx", version("gralora-fx"))


def _provider(names: list[str]) -> TracerProvider:
    """Create a provider with exporters; sampler, limits and batching come from the environment."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = {"service.name": "gralora-fx", "service.version": version("gralora-fx")}
    provider = TracerProvider(resource=Resource.create({**own, **OTELResourceDetector().detect().attributes}))
    found = {each.name: each for each in entry_points(group=_GROUP)}
    protocol = next((os.environ[each] for each in _PROTOCOLS if os.environ.get(each)), "http/protobuf")
    for name in names:
        exporter = found.get(_OTLP.get(protocol, protocol) if name == "otlp" else name)
        if exporter is None:
            what = f"{name} over {protocol}" if name == "otlp" else shown(name)
            there = listed(sorted(found)) or "none"
            raise ServingError(f"{EXPORTER} asks for the exporter {what}, which is not installed; there is {there}")
        try:
            provider.add_span_processor(BatchSpanProcessor(exporter.load()()))
        except ValueError as error:
            raise ServingError(f"the exporter {name} does not take what OTEL_ variables say ({error})") from error
    return provider


class SpanMiddleware:
    """Makes a span for every request, in the trace of its `traceparent` header; none for probes and the page."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        """Wrap an app."""
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and end its span when its response has ended."""
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, get_current_span, use_span

        is_inner = get_current_span().is_recording()  # inside FastAPI's own instrumentation, if the provider is global
        context = None if is_inner else extract(Headers(scope=scope))
        span = self._tracer.start_span(scope["method"], context, SpanKind.INTERNAL if is_inner else SpanKind.SERVER)
        if not span.is_recording():  # it is not sampled
            await self._app(scope, receive, send)
            return
        epoch = time.time_ns() - time.perf_counter_ns()
        status = 499  # nginx's status for a client that disconnected before the response

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:  # spans of libraries are children
            with use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            _describe(span, scope, status)
            if (answers := scope.get(_ANSWERS)) is not None:
                _describe_answers(span, answers)
                self._trace_jobs(span, answers.jobs, epoch)
            span.end()

    def _trace_jobs(self, span: Span, jobs: list[TextJob], epoch: int) -> None:
        """Make the spans of answers, whose times have passed."""
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(span)
        for index, job in enumerate(jobs):
            for name, began, ended in _stages(job):
                at, until = (epoch + int(seconds * 1e9) for seconds in (began, ended))
                self._tracer.start_span(name, parent, attributes={"gralora_fx.answer": index}, start_time=at).end(until)


def _stages(job: TextJob) -> Iterator[tuple[str, float, float]]:
    """Yield the stages that a job has reached, each with its start and end in seconds."""
    times = job.times
    ended = times.ended or time.perf_counter()
    marks = (("queue", times.submitted), ("prompt", times.reading), ("decode", times.answering))
    reached = [(name, began) for name, began in marks if began is not None]
    for (name, began), after in zip(reached, [*(began for _, began in reached[1:]), ended], strict=True):
        yield name, began, max(began, after)


def _describe(span: Span, scope: Scope, status: int) -> None:
    """Set a request's attributes by the semantic conventions of HTTP and generative AI."""
    route = getattr(scope.get("route"), "path", None)
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.response.status_code": status,
        "url.path": scope["path"][:_MOST],
        "url.scheme": scope.get("scheme", "http"),
    }
    if route is not None:
        attributes["http.route"] = route
        span.update_name(f"{scope['method']} {route}")
        if route in _OPERATIONS:
            attributes["gen_ai.operation.name"] = _OPERATIONS[route]
            attributes["gen_ai.provider.name"] = "gralora_fx"
    if _MODEL in scope:
        model, adapter = scope[_MODEL]
        attributes["gen_ai.request.model"] = model
        if adapter is not None:
            attributes["gralora_fx.adapter"] = adapter
    if status >= 500:
        _fail(span, str(status))
    span.set_attributes(attributes)


def _fail(span: Span, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", kind)


def _describe_answers(span: Span, answers: Answers) -> None:
    """Set attributes of a request's parameters and usage; never a text."""
    jobs, usage = answers.jobs, answers.usage()
    request = jobs[0].request
    sampling = request.options.sampling
    attributes: dict[str, Any] = {
        "gen_ai.request.max_tokens": request.max_new_tokens,
        "gen_ai.request.temperature": sampling.temperature if sampling.do_sample else 0.0,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": [
            job.answer.ending or ("error" if job.is_done else "cancelled") for job in jobs
        ],
    }
    if sampling.do_sample:
        attributes |= {"gen_ai.request.top_p": sampling.top_p, "gen_ai.request.top_k": sampling.top_k}
    if len(jobs) > 1:
        attributes["gen_ai.request.choice.count"] = len(jobs)
    details: Any = usage.get("prompt_tokens_details")
    if details:
        attributes["gen_ai.usage.cache_read.input_tokens"] = details["cached_tokens"]
    if any(not job.is_done for job in jobs):
        attributes["gralora_fx.cancelled"] = True
    if any(job.is_done and job.answer.ending is None for job in jobs):
        _fail(span, "run_failed")
    span.set_attributes(attributes)
