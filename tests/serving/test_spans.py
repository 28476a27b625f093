"""Spans of requests, as a collector receives them: OTLP over HTTP, read by OpenTelemetry's own records."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from running_service import running
from served_exports import chat_tokenizer, decoders
from starlette.testclient import TestClient
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from gralora_fx.service.spans import tracing_of_environment
from gralora_fx.serving import Decoder

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
UNSEEN = "Zanzibar"


class Collector(ThreadingHTTPServer):
    """Takes spans, and has them by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.requests: list[ExportTraceServiceRequest] = []

    @property
    def spans(self) -> list[Any]:
        """All spans that came, in the order of their starts."""
        scopes = [scope for request in self.requests for each in request.resource_spans for scope in each.scope_spans]
        return sorted((span for scope in scopes for span in scope.spans), key=lambda span: span.start_time_unix_nano)


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders(tmp_path_factory.mktemp("spans"), "data")[0]["data"]


def described(span: Any) -> dict[str, Any]:
    """Return a span's attributes."""

    def value(of: Any) -> Any:
        kind = of.WhichOneof("value")
        return [value(each) for each in of.array_value.values] if kind == "array_value" else getattr(of, kind)

    return {each.key: value(each.value) for each in span.attributes}


def below(spans: list[Any], parent: Any) -> list[Any]:
    return [span for span in spans if span.parent_span_id == parent.span_id]


@pytest.mark.quick
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_answers(decoder: Path, collector: Collector, stream: bool) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    asked = {**CHAT, "messages": [{"role": "user", "content": UNSEEN}], "n": 2, "stream": stream, "top_p": 0.5}
    with TestClient(create_app(ServiceSettings(decoder))) as client:
        for path in ("/health", "/v2/health/live", "/metrics", "/"):
            assert client.get(path).status_code == 200
        answer = client.post("/v1/chat/completions", json=asked, headers=headers)
        assert answer.status_code == 200
        assert collector.spans == []  # sent in batches, and what is left at the end
    request, *stages = collector.spans
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    assert (request.name, request.kind) == ("POST /v1/chat/completions", request.SPAN_KIND_SERVER)
    attributes = described(request)
    reasons = attributes.pop("gen_ai.response.finish_reasons")
    tokens = attributes.pop("gen_ai.usage.output_tokens")
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "gralora_fx",
        "gen_ai.request.model": "small",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.input_tokens": len(chat_tokenizer()(f"user: {UNSEEN} assistant: ")["input_ids"]),
        "gralora_fx.adapter": "small",
    }
    if not stream:
        assert reasons == [choice["finish_reason"] for choice in answer.json()["choices"]]
        assert tokens == answer.json()["usage"]["completion_tokens"]
    assert sorted(span.name for span in stages) == ["decode"] * 2 + ["prompt"] * 2 + ["queue"] * 2
    assert len(below(collector.spans, request)) == 6
    for index in range(2):
        own = [span for span in stages if described(span) == {"gralora_fx.answer": index}]
        assert [span.name for span in own] == ["queue", "prompt", "decode"]
        assert all(one.end_time_unix_nano == next_.start_time_unix_nano for one, next_ in pairwise(own))
        assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in own)
        assert request.start_time_unix_nano <= own[0].start_time_unix_nano
        assert own[-1].end_time_unix_nano <= request.end_time_unix_nano
    resource = described(collector.requests[0].resource_spans[0].resource)
    assert resource["service.name"] == "gralora-fx"
    assert not any(UNSEEN in str(one) for one in collector.requests)


def test_what_goes_wrong(decoder: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "own")
    failing = threading.Event()
    step = Decoder.step

    def fails(self: Decoder, tokens: Any, *more: Any) -> Any:
        if failing.is_set():
            raise RuntimeError("a step")
        return step(self, tokens, *more)

    monkeypatch.setattr(Decoder, "step", fails)
    with TestClient(create_app(ServiceSettings(decoder))) as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "none"}).status_code == 404
        assert client.post("/nowhere", json={}).status_code == 404
        assert client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": "nonsense"}).status_code == 200
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert client.post("/v1/chat/completions", json=CHAT, headers=unsampled).status_code == 200
        failing.set()
        assert client.post("/v1/chat/completions", json={**CHAT, "stream": True}).status_code == 200
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 500
    requests = [span for span in collector.spans if not span.parent_span_id]
    assert [span.name for span in requests] == [
        "POST /v1/chat/completions",
        "POST",
        *["POST /v1/chat/completions"] * 3,
    ]
    assert len({span.trace_id for span in requests}) == 5
    of_each = [described(span) for span in requests]
    assert [one["http.response.status_code"] for one in of_each] == [404, 404, 200, 200, 500]
    assert [one.get("error.type") for one in of_each] == [None, None, None, "run_failed", "run_failed"]
    assert [span.status.code for span in requests] == [0, 0, 0, 2, 2]
    assert [one.get("gen_ai.response.finish_reasons", [None])[0] for one in of_each[3:]] == ["error", "error"]
    assert [span.name for span in below(collector.spans, requests[-1])] == ["queue", "prompt"]
    assert described(collector.requests[0].resource_spans[0].resource)["service.name"] == "own"


def test_a_client_that_goes_away(decoder: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    from httpx2 import Client

    permits, step = threading.Semaphore(4), Decoder.step

    def held(self: Decoder, tokens: Any, *more: Any) -> Any:
        assert permits.acquire(timeout=30)
        return step(self, tokens, *more)

    with running(ServiceSettings(decoder)) as (url, _):
        monkeypatch.setattr(Decoder, "step", held)
        with (
            Client() as client,
            client.stream("POST", f"{url}v1/chat/completions", json={**CHAT, "stream": True}) as got,
        ):
            next(got.iter_lines())
        permits.release(100)
    (request,) = [span for span in collector.spans if not span.parent_span_id]
    assert described(request)["gralora_fx.cancelled"] is True
    assert described(request)["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert "error.type" not in described(request)


def test_an_encoder(collector: Collector, tmp_path: Path) -> None:
    model = tiny_model("bert", num_labels=2, pad_token_id=0)
    export_onnx(trace(model), tmp_path / "news", verify=False, tokenizer=chat_tokenizer())
    with TestClient(create_app(ServiceSettings(tmp_path / "news"))) as client:
        assert client.post("/classify", json={"input": "a"}).status_code == 200
    (span,) = collector.spans
    assert span.name == "POST /classify"
    assert described(span)["gen_ai.request.model"] == "news"


def test_a_provider_that_is_there_is_used(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `opentelemetry-instrument`, or in a program that embeds the app."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    with TestClient(create_app(ServiceSettings(decoder))) as client:
        client.post("/v1/completions", json={"model": "wide", "prompt": "a", "max_tokens": 2})
    spans = exporter.get_finished_spans()
    own = [span.name for span in spans if span.instrumentation_scope.name == "gralora_fx"]
    assert own == ["queue", "prompt", "decode", "POST /v1/completions"]
    assert len({span.context.trace_id for span in spans}) == 1  # FastAPI makes spans too
    exporter.clear()
    with provider.get_tracer("own").start_as_current_span("later"):
        pass
    assert [span.name for span in exporter.get_finished_spans()] == ["later"]  # it goes on after the service


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "nobody"}, "the exporter 'nobody', which is not installed; there is .*console"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "otlp over http/json"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "100000"},
            "does not take what OTEL_ variables",
        ),
    ],
)
def test_exporters_that_are_not_there(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ServingError, match=message):
        create_app(ServiceSettings(tmp_path))


def test_no_exporter_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing_of_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name, value in (("OTEL_TRACES_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "true")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert tracing_of_environment() is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.warns(UserWarning, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set, but .*pip install 'gralora-fx\[otel\]'"):
        assert tracing_of_environment() is None
