"""The frontend of replicas, whose answers break off at every moment: each request has an answer, and its connection."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from running_service import serving
from starlette.types import Message

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.service.metrics import GatewayMetrics, Metrics
from gralora_fx.service.scale.frontend import Frontend
from gralora_fx.service.scale.spread_adapters import AsgiRequest

GONE = "the replica that ran the request has ended; try again"
FAILED = "the request failed; the server's log says why"
BODY = b'{"answer": 1}'
EVENTS = [b"data: {}\n\n", b"data: {}\n\n", b"data: [DONE]\n\n"]


def start(kind: bytes, **headers: bytes) -> Message:
    pairs = [(b"content-type", kind), *((name.encode(), value) for name, value in headers.items())]
    return {"type": "http.response.start", "status": 200, "headers": pairs}


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


JSON = [start(b"application/json", **{"content-length": str(len(BODY)).encode()}), body(BODY)]
PARTS = [JSON[0], body(BODY[:5], more=True), body(BODY[5:], more=True), body(b"")]
STREAM = [start(b"text/event-stream; charset=utf-8"), *(body(event, more=True) for event in EVENTS), body(b"")]


class Replicas:
    """Stands for Ray's handle: its answer to a request is some messages, and then an error or the end."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.error: Exception | None = None
        self.answer = SimpleNamespace(remote=self._answer)

    def options(self, **_: Any) -> Replicas:
        return self

    async def _answer(self, request: AsgiRequest) -> AsyncIterator[Message]:
        for message in self.messages:
            yield message
        if self.error is not None:
            raise self.error


@contextmanager
def frontend(replicas: Replicas, folder: Path, **settings: Any) -> Iterator[HTTPConnection]:
    """Yield a connection to a frontend, which stays open between requests."""
    made = Frontend(replicas, ServiceSettings(folder, **settings), ("small",), folder, folder / "access.log")
    with serving(made.__serve_build_asgi_app__()) as address:
        connection = HTTPConnection(*address, timeout=20)
        yield connection
        connection.close()


@pytest.fixture(scope="module")
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture(scope="module")
def connection(replicas: Replicas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HTTPConnection]:
    with frontend(replicas, tmp_path_factory.mktemp("frontend")) as found:
        yield found


def ask(connection: HTTPConnection, path: str = "/classify") -> tuple[HTTPResponse, str]:
    connection.request("POST", path, json.dumps({"input": "a"}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response, response.read().decode()


def unavailable() -> DeploymentUnavailableError:
    return DeploymentUnavailableError(DeploymentID("model", "gralora-fx-model"))


ERRORS: list[tuple[Callable[[], Exception], int, str]] = [
    (lambda: ActorDiedError(), 503, GONE),
    (lambda: ActorUnavailableError("no", None), 503, GONE),
    (unavailable, 503, "no replica takes requests; try again"),
    (lambda: BackPressureError(1, 1), 429, "as many requests wait as there is room for; try again"),
    (lambda: ObjectLostError("ab", None, ""), 500, FAILED),
]


@pytest.mark.parametrize("path", ["/classify", "/v2/models/small/infer"])
@pytest.mark.parametrize(("make", "status", "text"), ERRORS)
@pytest.mark.parametrize("whole", [JSON, PARTS])
def test_an_answer_is_whole_or_an_error(
    connection: HTTPConnection,
    replicas: Replicas,
    whole: list[Message],
    make: Callable[[], Exception],
    status: int,
    text: str,
    path: str,
) -> None:
    """One that ends after its last message is an answer, and its connection goes on with the next request."""
    for count in range(len(whole) + 1):
        replicas.messages, replicas.error = whole[:count], make()
        response, found = ask(connection, path)
        if count == len(whole):
            assert (response.status, found.encode()) == (200, BODY)
        else:
            error = json.loads(found)["error"]
            assert (response.status, error if path.startswith("/v2") else error["message"]) == (status, text)
            assert (response.headers["retry-after"] is not None) == (status in (429, 503))
        assert response.headers["connection"] != "close"
    replicas.messages, replicas.error = whole, None
    assert ask(connection)[1].encode() == BODY


def test_a_stream_ends_in_an_event(connection: HTTPConnection, replicas: Replicas) -> None:
    for count in range(len(STREAM) + 1):
        replicas.messages, replicas.error = STREAM[:count], ActorDiedError()
        response, found = ask(connection)
        events = found.split("\n\n")
        if count < 2:  # nothing was said yet
            assert (response.status, json.loads(found)["error"]["message"]) == (503, GONE)
        elif count == len(STREAM):
            assert found.encode() == b"".join(EVENTS)
        else:
            assert response.status == 200
            assert found.encode().startswith(b"".join(EVENTS[: count - 1]))
            assert json.loads(events[count - 1].removeprefix("data: "))["error"]["message"] == GONE
            assert events[count:] == ["data: [DONE]", ""]


def test_an_answer_without_an_end_is_an_error(connection: HTTPConnection, replicas: Replicas) -> None:
    replicas.messages, replicas.error = PARTS[:2], None
    response, found = ask(connection)
    assert (response.status, json.loads(found)["error"]["message"]) == (500, FAILED)


def test_what_the_frontend_answers_itself_is_counted_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests and rejections are of the same requests; a replica counts those that it answers."""
    metrics = Metrics()  # of this process: prometheus_client asks at its import whether there are several
    monkeypatch.setattr("gralora_fx.service.scale.frontend.Metrics", lambda: metrics)
    replicas = Replicas()
    with frontend(replicas, tmp_path, max_body=50) as connection:
        for messages, error in ((JSON, None), ([], ActorDiedError()), ([], BackPressureError(1, 1))):
            replicas.messages, replicas.error = messages, error
            ask(connection, "/v1/completions?key=secret")
        connection.request("POST", "/v1/completions", b"x" * 51)
        assert connection.getresponse().read()
        connection.request("GET", "/docs")
        assert connection.getresponse().read()
    samples = [s for family in metrics.registry.collect() for s in family.samples if s.value]
    requests = {(s.labels["method"], s.labels["code"]) for s in samples if s.name == "gralora_fx_requests_total"}
    reasons = {s.labels["reason"] for s in samples if s.name == "gralora_fx_rejections_total"}
    assert requests == {("POST", "503"), ("POST", "429"), ("POST", "413"), ("GET", "200")}
    assert reasons == {"stopping", "queue_full", "too_large"}
    assert not any("token" in s.name for s in samples)
    lines = (tmp_path / "access.log").read_text().splitlines()
    assert [line.split('"')[1] for line in lines] == ["POST /v1/completions HTTP/1.1"] * 4 + ["GET /docs HTTP/1.1"]
    assert [line.split()[-3] for line in lines] == ["200", "503", "429", "413", "200"]
    assert lines[0].split()[-2] == str(len(BODY))


def test_what_replicas_measure_is_added_up(tmp_path: Path) -> None:
    def measured(running: int, usage: float, names: tuple[str, ...]) -> list[Any]:
        limits, pending = SimpleNamespace(count=3), SimpleNamespace(requests=0, names=())
        models: Any = SimpleNamespace(pending=pending, limits=limits, adapters=names, base="base")
        queue: Any = SimpleNamespace(running=running, waiting=2, cache_usage=usage)
        return list(GatewayMetrics(models, queue).collect())

    async def results(*, return_exceptions: bool) -> list[Any]:
        return [measured(1, 0.5, ("a", "b")), ActorDiedError(), measured(2, 0.1, ("b", "c"))]

    replicas: Any = Replicas()
    replicas.broadcast = lambda method: SimpleNamespace(results_async=results)
    with frontend(replicas, tmp_path) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    values = {name: samples[0].value for name, samples in families.items() if name.startswith("vllm:")}
    del values["vllm:lora_requests_info"]  # a time
    assert values == {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 0,  # in the frontend and beyond it nothing but what runs
        "vllm:kv_cache_usage_perc": pytest.approx(0.3),
    }
    (info,) = families["vllm:lora_requests_info"]
    assert info.labels == {"max_lora": "3", "running_lora_adapters": "a,b,c", "waiting_lora_adapters": ""}
