"""Adapters of the root that requests name: found, loaded within the limits, told apart, and refused by name."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from served_adapters import complete, expected, load, lora, metric, settle, unload
from served_exports import adapted, chat_tokenizer, decoders
from starlette.testclient import TestClient

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ConfigError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.service.app import create_app

PROMPT = "Hello there"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    """Return an export without adapters of its own, beside PEFT's; and their models."""
    folder = tmp_path_factory.mktemp("on_demand")
    _, oracles = decoders(folder, "data")
    oracles["lora"] = lora()
    oracles["lora"].save_pretrained(str(folder / "lora"))
    (folder / "data" / "adapters").rename(folder / "files")
    return folder, oracles


@pytest.fixture
def root(made: tuple[Path, Any], tmp_path: Path) -> Path:
    """PEFT's `lora` and `peft`, which is `wide`, and files of `small` and `wide`."""
    folder = Path(shutil.copytree(made[0] / "files", tmp_path / "root"))
    shutil.copytree(made[0] / "lora", folder / "lora")
    shutil.copytree(made[0] / "wide", folder / "peft")
    return folder


def service(made: tuple[Path, Any], root: Path, **settings: Any) -> TestClient:
    return TestClient(create_app(ServiceSettings(made[0] / "data", adapter_root=root, **settings)))


def ids(client: TestClient, *, loaded: bool) -> list[str]:
    return [m["id"] for m in client.get("/v1/models").json()["data"] if m["loaded"] or not loaded]


def refused(client: TestClient, model: str) -> tuple[int, str, Any]:
    response = client.post("/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": 1})
    error = response.json()["error"]
    return response.status_code, error["message"], error["param"]


def test_requests_name_what_is_in_the_root(made: tuple[Path, Any], root: Path) -> None:
    oracles = {"small": "small", "wide": "wide", "peft": "wide", "lora": "lora"}
    with service(made, root, max_adapters=2) as client:
        assert (ids(client, loaded=False), ids(client, loaded=True)) == (["data", *sorted(oracles)], ["data"])
        assert client.get("/v1/models/wide").json()["loaded"] is False
        names = [*oracles, *reversed(oracles)] * 2
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda name: complete(client, name, PROMPT), names))
        assert found == [expected(made[1][oracles[name]], PROMPT) for name in names]
        settle(client)
        assert metric(client, "gralora_fx_adapter_versions") == 2
        assert metric(client, "gralora_fx_adapter_evictions_total") >= 2
        assert metric(client, "gralora_fx_adapter_load_seconds_count") >= 4
        (info,) = [
            sample
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if sample.name == "vllm:lora_requests_info"
        ]
        assert info.labels["max_lora"] == "2"
        assert info.labels["running_lora_adapters"].split(",") == ids(client, loaded=True)[1:]
        assert (info.labels["waiting_lora_adapters"], info.value > 1e9) == ("", True)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert metric(client, f"vllm:{name}", model_name="data") == 0


def test_what_leads_out_or_is_not_there_is_refused(made: tuple[Path, Any], root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(made[0] / "wide")
    (root / "file.onnx_adapter").symlink_to(made[0] / "files" / "wide.onnx_adapter")
    (root / "inside").symlink_to("peft")
    (root / "data").symlink_to("peft")  # the base's name
    with service(made, root / ".." / "root") as client:
        assert ids(client, loaded=False) == ["data", "inside", "lora", "peft", "small", "wide"]
        for name in ("..", "../wide", "a/b", "/etc", "", "nobody", "wide.json"):
            status, message, param = refused(client, name)
            assert (status, param) == (404, "model")
            assert message.startswith("no model ")
        for name in ("out", "file"):
            status, message, param = refused(client, name)
            assert (status, param) == (400, "model")
            assert f"the adapter '{name}' cannot be loaded" in message
            assert "is a link out of the adapter root" in message
        assert complete(client, "inside", PROMPT) == expected(made[1]["wide"], PROMPT)
        assert unload(client, "data").status_code == 404
        shutil.rmtree(root / "peft")
        assert refused(client, "inside")[1].startswith("no model 'inside'; there is data, and")


def test_a_damaged_file_is_read_once_until_it_changes(
    made: tuple[Path, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = root / "wide.onnx_adapter"
    whole = file.read_bytes()
    with service(made, root) as client:
        assert complete(client, "wide", PROMPT) == expected(made[1]["wide"], PROMPT)
        file.write_bytes(whole[:-100])
        assert complete(client, "wide", PROMPT) == expected(made[1]["wide"], PROMPT)  # what is in memory is whole
        (root / "cut.onnx_adapter").write_bytes(whole[:-100])
        shutil.copy(record_path(file), root / "cut.json")
        for _ in range(3):
            status, message, _ = refused(client, "cut")
            assert (status, "is not what cut.json describes" in message) == (400, True)
        assert metric(client, "gralora_fx_adapter_loads_total", outcome="refused") == 2
        (root / "cut.onnx_adapter").write_bytes(whole)
        assert complete(client, "cut", PROMPT) == expected(made[1]["wide"], PROMPT)
        for path in (root / "cut.onnx_adapter", root / "cut.json"):
            path.unlink()
        assert refused(client, "cut")[0] == 404
        for path in (file, record_path(file)):
            shutil.copy((root / "small.onnx_adapter").with_suffix(path.suffix), path)
        assert complete(client, "wide", PROMPT) == expected(made[1]["small"], PROMPT)


def test_an_adapter_whose_outputs_are_not_finite_is_refused(made: tuple[Path, Any], root: Path) -> None:
    file = root / "peft" / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in load_file(file).items()}, file)
    with service(made, root) as client:
        assert complete(client, "small", PROMPT) == expected(made[1]["small"], PROMPT)
        for _ in range(2):
            status, message, _ = refused(client, "peft")
            assert (status, "outputs with the adapter are not finite" in message) == (400, True)
        settle(client)
        assert ids(client, loaded=True) == ["data", "small"]
        assert metric(client, "gralora_fx_run_failures_total") == 0
        shutil.copy(made[0] / "wide" / "adapter_model.safetensors", root / "peft")
        assert complete(client, "peft", PROMPT) == expected(made[1]["wide"], PROMPT)


def test_names_that_requests_give_and_take_away(made: tuple[Path, Any], root: Path) -> None:
    with service(made, root, max_adapters=2) as client:
        assert load(client, "live", "peft", pin=False).status_code == 200
        assert load(client, "fixed", "small.onnx_adapter").status_code == 200
        for name in ("lora", "wide", "live", "fixed"):
            oracle = {"live": "wide", "fixed": "small"}.get(name, name)
            assert complete(client, name, PROMPT) == expected(made[1][oracle], PROMPT)
            assert "fixed" in ids(client, loaded=True)
        response = load(client, "other", "peft")
        assert response.status_code == 200  # in the room of one that nobody pinned
        response = load(client, "more", "peft")
        assert response.status_code == 400
        assert "max_adapters is 2, and 2 adapters of" in response.json()["error"]["message"]
        status, message, _ = refused(client, "lora")
        assert (status, "there is no room for 'lora': max_adapters is 2" in message) == (400, True)
        assert unload(client, "other").status_code == 200
        assert complete(client, "lora", PROMPT) == expected(made[1]["lora"], PROMPT)
        for name in ("lora", "live", "peft"):
            assert unload(client, name).status_code == 200
            assert refused(client, name)[0] == 404
            assert unload(client, name).status_code == 404
        assert ids(client, loaded=False) == ["data", "fixed", "small", "wide"]
        assert load(client, "peft", "peft", pin=False).status_code == 200
        assert complete(client, "peft", PROMPT) == expected(made[1]["wide"], PROMPT)


def test_limits_refuse_by_name_and_the_others_stay(made: tuple[Path, Any], root: Path) -> None:
    with service(made, root, max_adapter_rank=3, max_adapter_memory="40 KB") as client:
        assert complete(client, "small", PROMPT) == expected(made[1]["small"], PROMPT)
        status, message, param = refused(client, "wide")
        assert (status, param) == (400, "model")
        assert "the adapter 'wide' cannot be loaded" in message
        assert "rank 6, above the limit of 3" in message
        assert complete(client, "small", PROMPT) == expected(made[1]["small"], PROMPT)
    with service(made, root, max_adapter_memory="4KB") as client:
        status, message, _ = refused(client, "wide")
        assert (status, "max_adapter_memory is 4,000 bytes, and 0 adapters" in message) == (400, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_adapters": 1}, "adapter 'b'.*max_adapters is 1, and 1 adapters of"),
        ({"max_adapter_rank": 2}, "adapter 'b'.*rank 6, above the limit of 2"),
        ({"max_adapter_memory": "1KiB"}, "adapter 'a'.*max_adapter_memory is 1,024 bytes"),
    ],
)
def test_limits_below_what_is_given(made: tuple[Path, Any], settings: dict[str, Any], message: str) -> None:
    adapters = {"a": made[0] / "small", "b": made[0] / "wide"}
    with pytest.raises(ServingError, match=message):
        create_app(ServiceSettings(made[0] / "data", adapters=adapters, **settings))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_adapters": 0}, "max_adapters must be a whole number of at least 1, but got 0"),
        ({"max_adapters": "x"}, "max_adapters must be a whole number of at least 1, but got 'x'"),
        ({"max_adapter_rank": -1}, "max_adapter_rank must be a whole number of at least 1"),
        *(
            ({"max_adapter_memory": text}, "max_adapter_memory must be a number of bytes above 0, such as 512MiB")
            for text in ("", "0", "x", "1 XiB", "-1MiB", "1e9", "MiB", "0.1", 5, "nan", "٣MB")
        ),
    ],
)
def test_limits_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceSettings(Path("onnx"), **settings)


def test_an_encoder_with_a_root(tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path, num_labels=4, pad_token_id=0)
    model.set_adapter("small")
    export_onnx(model, tmp_path / "news", adapters="data", verify=False, tokenizer=chat_tokenizer())
    app = create_app(ServiceSettings(tmp_path / "news", adapter_root=tmp_path, max_adapters=2))
    with TestClient(app) as client:
        found = {
            name: client.post("/classify", json={"model": name, "input": PROMPT}).json()["data"][0]["probs"]
            for name in ("news", "small", "wide")
        }
        assert len({tuple(probs) for probs in found.values()}) == 3
        assert client.get("/v2/models/wide/ready").json() == {"name": "wide", "ready": True}
        example = client.get("/v2/models/wide/example").json()
        assert client.post("/v2/models/wide/infer", json=example).status_code == 200
        assert client.post("/v2/models/x/infer", json=example).status_code == 404
