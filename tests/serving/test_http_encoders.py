"""Encoders over HTTP: the Open Inference Protocol, classes and embeddings, mixed adapters, keys and metrics."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from sentence_encoders import TEXTS, encoded, gap, save_encoder
from served_exports import adapted, chat_tokenizer
from starlette.testclient import TestClient
from tiny_models import text_batch, tiny_model
from transformers import pipeline

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.model import OrtModel
from gralora_fx.service.app import create_app
from gralora_fx.service.protocols.openai.encoders import scores_of

Service = tuple[TestClient, str, dict[str | None, Any]]
SIZES: dict[str, Any] = {"num_labels": 3, "id2label": {0: "sport", 1: "art", 2: "law"}, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["data", "inputs"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("encoder")
    model, oracles = adapted("bert", folder, targets=["query", "value", "dense"], **SIZES)
    export_onnx(model, folder / "base", adapters=request.param, verify=False, tokenizer=chat_tokenizer())
    with TestClient(create_app(ServiceSettings(folder / "base", max_batch=4))) as client:
        yield client, "base", oracles


def tensor(name: str, values: Any, datatype: str = "INT64") -> dict[str, Any]:
    array = np.asarray(values)
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()}


def ids(*shape: int) -> dict[str, Any]:
    return tensor("input_ids", np.full(shape, 5))


def test_mixed_adapters_are_pefts(service: Service) -> None:
    client, base, oracles = service
    batches = [text_batch(1 + index % 3, 7) for index in range(12)]
    names = [*oracles] * 4

    def infer(inputs: dict[str, torch.Tensor], adapter: str | None) -> np.ndarray[Any, Any]:
        body = {"inputs": [tensor(name, value.numpy()) for name, value in inputs.items()]}
        found = client.post(f"/v2/models/{adapter or base}/infer", json=body).raise_for_status().json()
        (output,) = found["outputs"]
        assert (found["model_name"], output["name"], output["datatype"]) == (adapter or base, "logits", "FP32")
        return np.asarray(output["data"]).reshape(output["shape"])

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(infer, batches, names))
    for inputs, adapter, actual in zip(batches, names, results, strict=True):
        with torch.no_grad():
            reference = oracles[adapter](**inputs).logits.numpy()
        assert np.abs(actual - reference).max() <= 1e-4


@pytest.mark.quick
def test_classes_are_those_of_transformers_pipeline(service: Service) -> None:
    client, base, oracles = service
    texts = [text * times for times in (1, 2) for text in ("a", "Longer text", "x y")]
    for adapter, oracle in oracles.items():
        oracle = oracle if adapter is None else oracle.base_model.model
        classify = pipeline("text-classification", model=oracle, tokenizer=chat_tokenizer(), top_k=None)
        found = client.post("/classify", json={"model": adapter or base, "input": texts}).raise_for_status().json()
        for entry, reference in zip(found["data"], classify(texts), strict=True):
            scores = dict(zip(entry["labels"], entry["probs"], strict=True))
            assert scores == pytest.approx({label["label"]: label["score"] for label in reference}, abs=1e-5)
            assert entry["label"] == reference[0]["label"]
            assert set(scores) == {"sport", "art", "law"}
    assert found["usage"]["prompt_tokens"] == sum(map(len, texts))
    one = client.post("/classify", json={"input": "a"}).json()
    assert one["model"] == base
    assert len(one["data"]) == 1


@pytest.mark.parametrize("kind", [None, "multi_label_classification", "regression"])
@pytest.mark.parametrize("count", [1, 3])
def test_scores_are_those_of_transformers_pipeline(kind: str | None, count: int) -> None:
    if kind == "multi_label_classification" and count == 1:
        kind = None
    model = tiny_model("bert", num_labels=count, problem_type=kind, pad_token_id=0)
    tokenizer = chat_tokenizer()
    reference = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(["some text"])[0]
    with torch.no_grad():
        logits = model(**tokenizer("some text", return_tensors="pt")).logits[0].numpy()
    scores = {f"LABEL_{index}": score for index, score in enumerate(scores_of(logits, {"problem_type": kind}))}
    assert scores == pytest.approx({label["label"]: label["score"] for label in reference}, abs=1e-5)


def test_metadata_and_health(service: Service) -> None:
    client, base, _ = service
    found = client.get(f"/v2/models/{base}").json()
    assert found["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.get("/v2/models/wide/ready").json() == {"name": "wide", "ready": True}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/health", "/v2/health/live", "/v2/health/ready"):
        assert (client.head(path).status_code, client.head(path).content) == (200, b"")
    for path in ("/v2/models/other", "/v2/models/other/ready"):
        assert client.get(path).json() == {"error": "no model 'other'; there is base, small, wide"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "input 'input_ids' is missing"),
        ([{**ids(1, 3), "name": "x"}], "no input 'x'; the model takes input_ids"),
        ([ids(1, 3), ids(1, 3)], "input 'input_ids' is given twice"),
        ([{**ids(1, 3), "datatype": "FP32"}], "is 'FP32', but the model takes INT64"),
        ([{**ids(1, 3), "shape": [1, 4]}], "has 3 values, not those of shape"),
        ([{**ids(1, 3), "shape": [-1, -3]}], "has 3 values, not those of shape"),
        ([{**ids(1, 3), "shape": [10**9, 10**9]}], "has 3 values, not those of shape"),
        ([{**ids(1, 3), "data": [[5], [5], [5]]}], r"has shape \[3, 1\], not \[1, 3\]"),
        ([{**ids(1, 3), "data": [5, 5, 5.5]}], "is not of INT64"),
        ([{**ids(1, 3), "data": [5, 5, True]}], "is not of INT64"),
        ([{**ids(1, 3), "data": [5, 5, "5"]}], "is not of INT64"),
        ([{**ids(1, 3), "data": [5, 5, None]}], "is not of INT64"),
        ([{**ids(1, 3), "data": [5, [5], 5]}], "is not a tensor"),
        ([{**ids(1, 3), "data": [5, 5, 10**30]}], "is not of INT64"),
        ([{**ids(1, 3), "data": [5, 5, 2**63]}], "is not of INT64"),
        ([{**ids(1, 3), "data": [5, 5, 101]}], "outside the vocabulary of 101 tokens"),
        ([{**ids(1, 3), "data": [5, 5, -1]}], "ids are 0 or more"),
        ([ids(0, 3)], "is empty"),
        ([ids(3)], "but the model takes"),
        ([ids(1, 65)], "more than the context of 64"),
        ([ids(1, 3), tensor("attention_mask", np.ones((2, 3), int))], "has batch_size 2"),
        ([ids(1, 3), tensor("attention_mask", np.full((1, 3), 2))], "must be 1 where a position counts"),
        ([ids(69, 3)], "69 rows are given, and there is room for 68"),
    ],
)
def test_bad_tensors(service: Service, inputs: list[Any], message: str) -> None:
    found = service[0].post("/v2/models/wide/infer", json={"inputs": inputs})
    assert found.status_code == 400
    assert found.json().keys() == {"error"}
    with pytest.raises(ServingError, match=message):
        raise ServingError(found.json()["error"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "other", "input": "a"}, 404),
        ({"input": []}, 400),
        ({"input": [""]}, 400),
        ({"input": 5}, 400),
        ({"input": "a" * 65}, 400),
        ({"input": "\ud800"}, 400),
        ({"input": "a", "other": 1}, 400),
    ],
)
def test_bad_texts(service: Service, body: dict[str, Any], status: int) -> None:
    found = service[0].post("/classify", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert found.status_code == status
    assert found.json()["error"]["code"] == status


def test_a_deadline_ends_a_request_and_leaves_its_mates(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    client, base, _ = service
    started, held, run = threading.Event(), threading.Event(), OrtModel.__call__
    rows: list[int] = []

    def wait(model: OrtModel, *args: Any, **inputs: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        started.set()
        assert held.wait(20)
        return run(model, *args, **inputs)

    monkeypatch.setattr(OrtModel, "__call__", wait)
    body, late = {"inputs": [ids(1, 4)]}, {"X-Request-Timeout": "0.1"}
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.post, f"/v2/models/{base}/infer", json=body)
        assert started.wait(20)
        for path, given in ((f"/v2/models/{base}/infer", body), ("/classify", {"input": "ab"})):
            found = client.post(path, json=given, headers=late)
            assert (found.status_code, found.headers["x-should-retry"]) == (504, "false")
            assert "was not answered within 0.1 s" in found.text
        mate = pool.submit(client.post, f"/v2/models/{base}/infer", json=body)
        held.set()
        assert running.result().status_code == mate.result().status_code == 200
    assert sum(rows) == 2  # those that were given up while they waited did not run


def test_what_a_model_cannot_do_is_not_there(service: Service) -> None:
    for path in ("/v1/embeddings", "/v1/completions", "/v1/chat/completions"):
        assert service[0].post(path, json={}).status_code == 404


def test_embeddings_are_sentence_transformers(tmp_path: Path) -> None:
    encoder = save_encoder("bert", tmp_path, "mean")
    export_onnx(load_traced(str(encoder), None, None), tmp_path / "onnx", tokenizer=str(encoder), verify=False)
    reference = encoded(encoder)
    with TestClient(create_app(ServiceSettings(tmp_path / "onnx"))) as client:
        body = {"model": "onnx", "input": TEXTS, "user": "somebody"}
        found = client.post("/v1/embeddings", json=body).raise_for_status().json()
        vectors = np.asarray([entry["embedding"] for entry in found["data"]])
        assert gap(vectors, reference) <= 1e-5
        coded = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"]
        floats = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in coded]
        assert np.array_equal(np.stack(floats), vectors.astype(np.float32))
        ids = [chat_tokenizer()(text)["input_ids"] for text in TEXTS]
        by_ids = client.post("/v1/embeddings", json={**body, "input": ids}).json()["data"]
        assert gap(np.asarray([entry["embedding"] for entry in by_ids]), reference) <= 1e-5
        assert client.post("/v1/embeddings", json={**body, "dimensions": 8}).status_code == 400
        assert client.post("/classify", json={"input": "a"}).status_code == 404


def test_outputs_that_are_not_finite_are_no_scores(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    run = OrtModel.__call__

    def overflow(model: OrtModel, *args: Any, **inputs: Any) -> dict[str, Any]:
        return {name: array * np.inf for name, array in run(model, *args, **inputs).items()}

    monkeypatch.setattr(OrtModel, "__call__", overflow)
    found = service[0].post("/classify", json={"input": "a"})
    assert (found.status_code, found.json()["error"]["message"]) == (400, "the model's output for a text is not finite")


def test_a_model_without_texts_takes_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    torch.nn.init.ones_(network[0].weight)
    export_onnx(trace(network, (torch.randn(2, 4),)), tmp_path / "net", verify=False)
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        (name,) = [value["name"] for value in client.get("/v2/models/net").json()["inputs"]]
        x = torch.randn(2, 4)
        found = client.post("/v2/models/net/infer", json={"inputs": [tensor(name, x.numpy(), "FP32")], "id": "7"})
        assert found.json()["id"] == "7"
        values = np.asarray(found.json()["outputs"][0]["data"]).reshape(2, 3)
        assert np.abs(values - network(x).detach().numpy()).max() <= 1e-5
        for number in ("NaN", "Infinity", "1e39", "1e38"):  # four of the last overflow in the network
            fields = {"name": name, "shape": [1, 4], "datatype": "FP32", "data": ["NUMBER"] * 4}
            body = json.dumps({"inputs": [fields]}).replace('"NUMBER"', number)
            refused = client.post("/v2/models/net/infer", content=body, headers={"Content-Type": "application/json"})
            assert refused.status_code == 400
            assert "not finite" in refused.json()["error"]


def test_a_key_is_asked_for(service: Service, tmp_path: Path) -> None:
    export_onnx(trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),)), tmp_path / "net", verify=False)
    with TestClient(create_app(ServiceSettings(tmp_path / "net", api_key="secret"))) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": b"\xff"}):
            for path in ("/v1/models", "/metrics", "/v2/models/net", "/other", "/openapi.json"):
                found = client.get(path, headers=headers)
                assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
                assert "secret" not in found.text
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_metrics_count(tmp_path: Path) -> None:
    export_onnx(trace(tiny_model("bert", **SIZES)), tmp_path / "net", verify=False, tokenizer=chat_tokenizer())
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        client.post("/classify", json={"input": ["abc", "de"]})
        client.post("/classify", json={"input": []})
        client.get("/v1/models/one")
        client.get("/v1/models/two")
        client.get("/never/seen")
        families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    samples = {
        (sample.labels["route"], sample.labels["code"]): sample.value
        for sample in families["gralora_fx_requests"].samples
        if sample.name.endswith("_total")
    }
    assert samples == {
        ("/classify", "200"): 1,
        ("/classify", "400"): 1,
        ("/v1/models/{name}", "404"): 2,
        ("other", "404"): 1,
    }
    sums = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert sums["gralora_fx_batch_size_sum"] == 2
    assert sums["gralora_fx_queue_seconds_count"] == 2
    assert sums["gralora_fx_run_seconds_count"] in (1, 2)
    tokens = {
        sample.labels["kind"]: sample.value
        for sample in families["gralora_fx_tokens"].samples
        if "kind" in sample.labels
    }
    assert tokens["prompt"] == 5


def test_exports_that_are_not_served(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"no gralora_export\.json"):
        create_app(ServiceSettings(tmp_path))
    export_onnx(trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),)), tmp_path / "net", verify=False)
    with pytest.raises(ServingError, match="takes no adapters"):
        create_app(ServiceSettings(tmp_path / "net", adapters={"a": tmp_path / "a.onnx_adapter"}))
    with pytest.raises(ServingError, match="max_context has no effect"):
        create_app(ServiceSettings(tmp_path / "net", max_context=8))
    cached = trace(tiny_model("t5", num_layers=1, decoder_start_token_id=0), task="text2text-generation-with-past")
    export_onnx(cached, tmp_path / "t5", verify=False)
    with pytest.raises(ServingError, match="holds no tokenizer"):
        create_app(ServiceSettings(tmp_path / "t5"))
