"""Metrics after real requests, read with Prometheus' own parser: what runs, waits, is rejected and fails."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from served_exports import chat_tokenizer, decoders
from starlette.testclient import TestClient
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.model import OrtModel
from gralora_fx.service.app import create_app
from gralora_fx.service.metrics import REASONS, Metrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders(tmp_path_factory.mktemp("metrics"), "data")[0]["data"]


@pytest.fixture
def services() -> Iterator[Any]:
    """Open a client of a service."""
    clients: list[TestClient] = []

    def serve(path: Path, **settings: Any) -> TestClient:
        client = TestClient(create_app(ServiceSettings(path, **settings)))
        clients.append(client.__enter__())
        return client

    yield serve
    for client in clients:
        client.__exit__(None, None, None)


def scrape(client: TestClient) -> Samples:
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def rejections(samples: Samples) -> dict[str, float]:
    """Return counts above zero by reason; for each method they are of the requests that are counted."""
    found: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for (name, labels), count in samples.items():
        fields = dict(labels)
        if name == "gralora_fx_rejections_total":
            found[fields["reason"]] += int(count)
            rejected[fields["method"]] += int(count)
        if name == "gralora_fx_requests_total" and (fields["code"][0] == "4" or fields["code"] in ("503", "504")):
            rejected[fields["method"]] -= int(count)
    assert set(found) == set(REASONS)
    assert not any(rejected.values())
    return {reason: count for reason, count in found.items() if count}


class HeldSteps:
    """Lets no step of a decoder begin before it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_go = threading.Event(), threading.Event()
        step = Decoder.step

        def held(decoder: Decoder, tokens: Any, *more: Any) -> Any:
            self.begun.set()
            assert self.may_go.wait(20)
            return step(decoder, tokens, *more)

        monkeypatch.setattr(Decoder, "step", held)


def test_the_model_and_the_process(decoder: Path, services: Any) -> None:
    samples = scrape(services(decoder))
    (labels,) = [labels for name, labels in samples if name == "gralora_fx_model_info"]
    facts = dict(labels)
    assert facts.pop("version")
    assert facts == {
        "base": "data",
        "task": "text-generation-with-past",
        "adapters_mode": "data",
        "precision": "fp32",
        "quantization": "none",
    }
    memory = psutil.Process(os.getpid()).memory_info().rss
    assert value(samples, "process_resident_memory_bytes") == pytest.approx(memory, rel=0.5)
    assert value(samples, "process_cpu_seconds_total") > 0


def test_what_runs_and_what_waits(decoder: Path, services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = services(decoder, max_batch=1, max_queue=2)
    body = {"model": "small", "prompt": "ab", "temperature": 0, "max_tokens": 2}
    steps = HeldSteps(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
        assert steps.begun.wait(20)
        queue = client.app.state.engine.queue  # type: ignore[attr-defined]
        while queue.in_flight < 3:
            assert not answers[0].done()
        samples = scrape(client)
        assert value(samples, "gralora_fx_requests_in_flight") == 3
        assert value(samples, "gralora_fx_queue_length") == 2
        assert client.post("/v1/completions", json=body).status_code == 429
        steps.may_go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
    samples = scrape(client)
    assert value(samples, "gralora_fx_requests_in_flight") == 0
    assert value(samples, "gralora_fx_queue_length") == 0
    assert value(samples, "gralora_fx_run_failures_total") == 0
    assert rejections(samples) == {"queue_full": 1}


def test_why_requests_are_rejected(decoder: Path, services: Any) -> None:
    client = services(decoder, max_batch=1, max_queue=1, api_key="secret")
    client.headers["Authorization"] = "Bearer secret"
    for change in ({"max_tokens": 64}, {"prompt": ["a"] * 3}):
        assert client.post("/v1/completions", json={"model": "small", "prompt": "a", **change}).status_code == 400
    assert client.post("/v1/completions", json={"model": "other", "prompt": "a"}).status_code == 404
    assert client.get("/never/seen").status_code == 404
    assert client.put("/v1/completions").status_code == 405
    assert client.post("/v1/completions", json={"model": "small", "prompt": ""}).status_code == 400
    assert client.post("/v1/completions", content=b"{").status_code == 400
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    expected = {"too_large": 2, "not_found": 3, "invalid": 2, "unauthorized": 1}
    assert rejections(scrape(client)) == expected
    client.app.state.engine.stop()  # type: ignore[attr-defined]
    assert client.post("/v1/completions", json={"model": "small", "prompt": "a"}).status_code == 503
    assert rejections(scrape(client)) == {**expected, "stopping": 1}


def test_runs_that_fail(decoder: Path, services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = services(decoder)
    body = {"model": "small", "prompt": "ab", "temperature": 0, "max_tokens": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", lambda *_: 1 / 0)
        assert [client.post("/v1/completions", json=body).status_code for _ in range(2)] == [500, 500]
    assert client.post("/v1/completions", json=body).status_code == 200
    samples = scrape(client)
    assert value(samples, "gralora_fx_run_failures_total") == 2
    assert rejections(samples) == {}


def test_rows_of_an_encoder(tmp_path: Path, services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert", num_labels=2, pad_token_id=0)
    export_onnx(trace(model), tmp_path / "net", verify=False, tokenizer=chat_tokenizer())
    client = services(tmp_path / "net", max_batch=2, max_queue=3)
    begun, may_go = threading.Event(), threading.Event()
    call = OrtModel.__call__

    def held(self: OrtModel, *args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert may_go.wait(20)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(OrtModel, "__call__", held)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/classify", json={"input": ["a", "b", "c"]})
        assert begun.wait(20)
        assert value(scrape(client), "gralora_fx_queue_length") in (1, 2)  # beside the rows of the first batch
        assert client.post("/classify", json={"input": ["a"] * 3}).status_code == 429
        may_go.set()
        assert answer.result().status_code == 200
    assert client.post("/classify", json={"input": ["a"] * 6}).status_code == 400
    assert client.post("/classify", json={"input": "a" * 65}).status_code == 400
    with monkeypatch.context() as patch:
        patch.setattr(OrtModel, "__call__", lambda *_, **__: torch.zeros(1).missing)
        assert client.post("/classify", json={"input": "a"}).status_code == 500
    samples = scrape(client)
    assert rejections(samples) == {"queue_full": 1, "too_large": 2}
    assert value(samples, "gralora_fx_run_failures_total") == 1
    assert value(samples, "gralora_fx_queue_length") == 0


def test_tokens_are_measured_where_there_are_some(tmp_path: Path, decoder: Path, services: Any) -> None:
    """A model without tokens has no figures of them; one that reads texts has none of what is generated."""
    linear = trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),))
    export_onnx(linear, tmp_path / "linear", verify=False)
    model = trace(tiny_model("bert", num_labels=2, pad_token_id=0))
    export_onnx(model, tmp_path / "texts", verify=False, tokenizer=chat_tokenizer())
    export_onnx(model, tmp_path / "tensors", verify=False)

    def figures(path: Path) -> set[str]:
        client = services(path)
        client.post("/classify", json={"input": "a"})
        return {f"{name} {dict(labels).get('kind')}" for name, labels in scrape(client) if "token" in name}

    assert figures(tmp_path / "linear") == figures(tmp_path / "tensors") == set()
    assert figures(tmp_path / "texts") == {f"gralora_fx_tokens_{part} prompt" for part in ("total", "created")}
    names = {name.partition(" ")[0] for name in figures(decoder)}
    assert {"gralora_fx_tokens_total", "gralora_fx_time_to_first_token_seconds_count"} <= names


def test_methods_that_http_has_not_are_one_label() -> None:
    metrics = Metrics()
    for index in range(5):
        metrics.answered({"method": f"METHOD{index}"}, 429)
    labels = {"route": "other", "method": "other", "code": "429"}
    assert metrics.registry.get_sample_value("gralora_fx_requests_total", labels) == 5
