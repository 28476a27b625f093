"""Adapters that come and go while an export is served: answers are PEFT's, and every request keeps its version."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from served_adapters import complete, expected, load, loaded, lora, metric, settle, unload, wait_for
from served_exports import adapted, chat_tokenizer, decoders
from starlette.testclient import TestClient
from tiny_models import text_batch

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine import adapter_slots
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot
from gralora_fx.service.adapter_store.store import AdapterTrial
from gralora_fx.service.app import create_app
from gralora_fx.service.scheduling.text_jobs import TextJob
from gralora_fx.serving import OrtModel

MODES = ("data", "inputs")
PROMPT = "Hello there"


@dataclass(frozen=True)
class Made:
    """Exports by mode in a folder that also holds PEFT's adapters, and PEFT's models of these."""

    folder: Path
    oracles: dict[str | None, Any]

    def service(self, name: str, **settings: Any) -> TestClient:
        root = settings.pop("adapter_root", self.folder)
        return TestClient(create_app(ServiceSettings(self.folder / name, adapter_root=root, **settings)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("live")
    _, oracles = decoders(folder, *MODES, "merged")
    oracles["lora"] = lora()
    oracles["lora"].save_pretrained(str(folder / "lora"))
    return Made(folder, oracles)


@pytest.fixture(scope="module", params=MODES)
def service(request: pytest.FixtureRequest, made: Made) -> Iterator[TestClient]:
    with made.service(request.param) as client:
        yield client


@pytest.fixture(scope="module")
def data_service(made: Made) -> Iterator[TestClient]:
    with made.service("data") as client:
        yield client


def test_what_is_loaded_answers_as_in_peft(service: TestClient, made: Made) -> None:
    for path, oracle in (("wide", "wide"), ("lora", "lora"), ("data/adapters/small.onnx_adapter", "small")):
        loaded(service, "new", path)
        assert "new" in [model["id"] for model in service.get("/v1/models").json()["data"]]
        assert service.get("/v1/models/new").status_code == 200
        assert complete(service, "new", PROMPT) == expected(made.oracles[oracle], PROMPT)
        response = unload(service, "new")
        assert response.text == "Success: LoRA adapter 'new' removed successfully."
        assert service.get("/v1/models/new").status_code == 404
        body = {"model": "new", "prompt": PROMPT, "max_tokens": 1}
        assert service.post("/v1/completions", json=body).status_code == 404
    assert len({expected(oracle, PROMPT) for oracle in made.oracles.values()}) == 4


def test_a_name_is_replaced_only_if_that_is_asked_for(service: TestClient, made: Made) -> None:
    loaded(service, "live", "small")
    response = load(service, "live", "wide")
    assert response.status_code == 400
    assert "load_inplace" in response.json()["error"]["message"]
    assert complete(service, "live", PROMPT) == expected(made.oracles["small"], PROMPT)
    loaded(service, "live", "wide", load_inplace=True)
    assert complete(service, "live", PROMPT) == expected(made.oracles["wide"], PROMPT)
    assert unload(service, "live").status_code == 200
    assert unload(service, "live").status_code == 404


def test_what_the_export_came_with_can_go(service: TestClient, made: Made) -> None:
    assert unload(service, "small").status_code == 200
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 1}
    assert service.post("/v1/completions", json=body).status_code == 404
    loaded(service, "small", "small")
    assert complete(service, "small", PROMPT) == expected(made.oracles["small"], PROMPT)


class Gate:
    """Holds the scheduler's thread at the third token of the first answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        take = TextJob.take

        def gated(job: TextJob, token: int) -> None:
            take(job, token)
            if len(job.answer.ids) == 3 and not self.reached.is_set():
                self.reached.set()
                assert self.opened.wait(30)

        monkeypatch.setattr(TextJob, "take", gated)


def test_requests_keep_the_version_that_they_began_with(
    service: TestClient, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(service, "live", "small")
    settle(service)
    before = metric(service, "gralora_fx_adapter_versions")
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(complete, service, "live", PROMPT)
        assert gate.reached.wait(30)
        waiting = pool.submit(complete, service, "live", "a")
        queue: Any = service.app.state.engine.queue  # type: ignore[attr-defined]
        wait_for(lambda: queue.in_flight == 2)
        loaded(service, "live", "wide", load_inplace=True)
        settle(service)
        assert metric(service, "gralora_fx_adapter_versions") == before + 1
        newer = pool.submit(complete, service, "live", PROMPT)
        wait_for(lambda: queue.in_flight == 3)
        assert unload(service, "live").status_code == 200
        assert service.get("/v1/models/live").status_code == 404
        gate.opened.set()
        assert running.result(30) == expected(made.oracles["small"], PROMPT)
        assert waiting.result(30) == expected(made.oracles["small"], "a")
        assert newer.result(30) == expected(made.oracles["wide"], PROMPT)
    # a row is freed after its last token
    wait_for(lambda: metric(service, "gralora_fx_adapter_versions") == before - 1)


@pytest.mark.usefixtures("own_garbage")
def test_the_memory_of_old_versions_is_freed(service: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = service.app.state.engine  # type: ignore[attr-defined]
    served = engine.models
    models: list[OrtModel] = []
    load = OrtModel.load_adapter
    monkeypatch.setattr(OrtModel, "load_adapter", lambda model, *given: (models.append(model), load(model, *given))[1])
    loaded(service, "live", "small")
    model = models[0]
    complete(service, "live", PROMPT)
    key = served.hold_named("live").key
    old = weakref.ref(model.adapters[key])
    served.release(key)
    loaded(service, "live", "wide", load_inplace=True)
    complete(service, "live", PROMPT)
    wait_for(lambda: len(served) == len(served.adapters))
    settle(service)
    gc.collect()
    assert old() is None
    assert len(model.adapters.loaded) == len(served.adapters)
    unload(service, "live")


@pytest.mark.parametrize(
    "place", [(AdapterRoot, "source"), (AdapterTrial, "__call__"), (adapter_slots, "write_adapter")]
)
def test_requests_are_answered_while_an_adapter_is_loaded(
    data_service: TestClient, made: Made, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    reached, opened, work = threading.Event(), threading.Event(), getattr(*place)

    def slow(*arguments: Any) -> Any:
        if threading.current_thread().name.startswith("gralora-fx adapters"):
            reached.set()
            assert opened.wait(30)
        return work(*arguments)

    complete(data_service, "small", PROMPT)
    monkeypatch.setattr(*place, slow)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(loaded, data_service, "slow", "lora")
        assert reached.wait(30)
        for name in ("small", "wide"):
            assert complete(data_service, name, PROMPT) == expected(made.oracles[name], PROMPT)
        assert data_service.get("/v1/models/slow").status_code == 404
        opened.set()
        loading.result(30)
    assert complete(data_service, "slow", PROMPT) == expected(made.oracles["lora"], PROMPT)
    assert unload(data_service, "slow").status_code == 200
    settle(data_service)


def test_an_adapter_whose_outputs_are_not_finite_is_refused(service: TestClient, made: Made, tmp_path: Path) -> None:
    folder = made.folder / "huge"
    shutil.copytree(made.folder / "wide", folder, dirs_exist_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: torch.full_like(value, 1e30) for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    answer = complete(service, "wide", PROMPT)
    response = load(service, "wide", "huge", load_inplace=True)
    assert response.status_code == 400
    assert "outputs with the adapter are not finite" in response.json()["error"]["message"]
    assert complete(service, "wide", PROMPT) == answer


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"lora_name": "x"}, 400, "lora_path is missing"),
        ({"lora_name": "x", "lora_path": 1}, 400, "lora_path: Input"),
        ({"lora_name": "x", "lora_path": "wide", "is_3d_lora_weight": True}, 400, "is_3d_lora_weight is not supported"),
        ({"lora_name": "a/b", "lora_path": "wide"}, 400, "is not a name for an adapter"),
        ({"lora_name": "\0", "lora_path": "wide"}, 400, "is not a name for an adapter"),
        ({"lora_name": "data", "lora_path": "wide"}, 400, "is the name of the base"),
        ({"lora_name": "small", "lora_path": "wide"}, 400, "is loaded already"),
        ({"lora_name": "x", "lora_path": "../x"}, 400, "without '..'"),
        ({"lora_name": "x", "lora_path": "/etc/passwd"}, 400, "outside the adapter root"),
        ({"lora_name": "x", "lora_path": "none"}, 404, "there is no adapter at 'none'"),
    ],
)
def test_bad_loads(data_service: TestClient, fields: dict[str, Any], status: int, message: str) -> None:
    response = data_service.post("/v1/load_lora_adapter", json=fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert error["code"] == status
    fault = "name" if any(word in message for word in ("name", "already")) else "path"
    assert error["param"] == ("is_3d_lora_weight" if "is_3d" in message else f"lora_{fault}")
    assert "/tmp" not in error["message"]
    assert data_service.post("/v1/unload_lora_adapter", json={}).status_code == 400
    assert metric(data_service, "gralora_fx_adapters_loaded") == 2


def test_adapters_stay_unless_a_root_is_given(made: Made) -> None:
    with made.service("data", adapter_root=None) as client:
        for response in (load(client, "new", "wide"), unload(client, "small")):
            assert response.status_code == 404
            assert "without --adapter-root" in response.json()["error"]["message"]
        assert client.get("/v1/models/small").status_code == 200


def test_a_merged_export_takes_none(made: Made) -> None:
    with made.service("merged") as client:
        response = load(client, "new", "wide")
        assert response.status_code == 400
        assert "exported with adapters='merged'" in response.json()["error"]["message"]
        assert unload(client, "new").status_code == 404


def test_loads_are_counted(made: Made) -> None:
    with made.service("data") as client:
        loaded(client, "new", "wide")
        load(client, "new", "wide")
        load(client, "other", "none")
        assert metric(client, "gralora_fx_adapter_loads_total", outcome="ok") == 1
        assert metric(client, "gralora_fx_adapter_loads_total", outcome="refused") == 2
        assert metric(client, "gralora_fx_adapters_loaded") == 3


SIZES: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}


@pytest.mark.parametrize(("mode", "has_tokenizer"), [("data", True), ("data", False), ("inputs", True)])
def test_encoders_of_every_kind(tmp_path: Path, mode: str, has_tokenizer: bool) -> None:
    model, oracles = adapted("bert", tmp_path, targets=["query", "value", "dense"], **SIZES)
    more: dict[str, Any] = {"tokenizer": chat_tokenizer()} if has_tokenizer else {}
    export_onnx(model, tmp_path / "onnx", adapters=mode, verify=False, **more)  # type: ignore[arg-type]
    inputs = text_batch(2, 7)
    tensors = [
        {"name": name, "shape": list(value.shape), "datatype": "INT64", "data": value.flatten().tolist()}
        for name, value in inputs.items()
    ]

    def infer(client: TestClient) -> np.ndarray[Any, Any]:
        (output,) = client.post("/v2/models/live/infer", json={"inputs": tensors}).raise_for_status().json()["outputs"]
        return np.asarray(output["data"]).reshape(output["shape"])

    with TestClient(create_app(ServiceSettings(tmp_path / "onnx", adapter_root=tmp_path))) as client:
        for path, oracle in (("small", "small"), ("onnx/adapters/wide.onnx_adapter", "wide")):
            loaded(client, "live", path, load_inplace=True)
            with torch.no_grad():
                reference = oracles[oracle](**inputs).logits.numpy()
            assert np.abs(infer(client) - reference).max() <= 1e-4
        assert unload(client, "live").status_code == 200
        assert client.post("/v2/models/live/infer", json={"inputs": tensors}).status_code == 404
        assert client.get("/v2/models/live/ready").status_code == 404
        settle(client)
        assert metric(client, "gralora_fx_adapter_versions") == 2


def test_a_model_of_images(tmp_path: Path) -> None:
    model, _ = adapted("vit", tmp_path, targets=["q_proj", "v_proj"])
    export_onnx(model, tmp_path / "onnx", adapters="data", verify=False)
    with TestClient(create_app(ServiceSettings(tmp_path / "onnx", adapter_root=tmp_path))) as client:
        loaded(client, "new", "wide")
        assert client.get("/v2/models/new/ready").status_code == 200
