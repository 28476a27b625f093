"""`--adapter NAME=DIR`: what PEFT saved, served from the start, as PEFT's model answers, by every kind of export."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_oracle import peft_model, perturb_saved_modules
from safetensors.torch import load_file, save_file
from served_adapters import complete, expected, load
from served_exports import END, chat_tokenizer, decoders
from starlette.testclient import TestClient
from tiny_models import text_batch, tiny_model
from typer.testing import CliRunner

from gralora_fx import GraloraModel, trace
from gralora_fx.cli import app
from gralora_fx.cli.values import read_adapters
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import CheckpointError, ConfigError, ExportError, GraloraError, ServingError
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.service import server
from gralora_fx.service.adapter_store.store import converted
from gralora_fx.service.app import create_app

MODES = ("data", "inputs")
LLAMA: dict[str, Any] = {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0}
BERT: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}
FORMS: dict[str, dict[str, Any]] = {
    "gralora": {"r": 4, "gralora_k": 2, "alpha": 32},
    "hybrid": {"r": 4, "hybrid_r": 2, "gralora_k": 2, "alpha": 32},
    "lora": {"method": "LORA", "r": 3, "lora_alpha": 48},
    "rslora": {"method": "LORA", "r": 4, "lora_alpha": 24, "use_rslora": True},
}


def saved(name: str, folder: Path, sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """PEFT's models by the form of their adapter, each saved under its name."""
    oracles = {}
    for seed, (form, fields) in enumerate(FORMS.items(), 10):
        oracles[form] = peft_model(
            tiny_model(name, **sizes), seed, **{"target_modules": "all-linear", **fields, **more}
        )
        perturb_saved_modules(oracles[form])
        with torch.no_grad():
            for path, parameter in oracles[form].named_parameters():
                if path.endswith("bias") and parameter.requires_grad and "modules_to_save" not in path:
                    parameter += 0.1 * torch.randn(parameter.shape)
        oracles[form].save_pretrained(str(folder / form))
    return oracles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("given")


@pytest.fixture(scope="module")
def answering(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return decoders by mode, and the oracles of the forms."""
    (folder / "llama").mkdir()
    decoders(folder / "llama", *MODES)
    return folder / "llama", saved("llama", folder / "llama", LLAMA)


@pytest.fixture(scope="module")
def classifying(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Classifiers by mode, and the oracles of the forms, which train the head and biases too."""
    (folder / "bert").mkdir()
    trained = {"target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"], "bias": "all"}
    oracles = saved("bert", folder / "bert", BERT, **trained, task_type="SEQ_CLS")
    model = GraloraModel.from_pretrained(trace(tiny_model("bert", **BERT)), folder / "bert" / "gralora")
    for mode in MODES:
        export_onnx(model, folder / "bert" / mode, adapters=mode, verify=False, tokenizer=chat_tokenizer())  # type: ignore[arg-type]
    return folder / "bert", oracles


@pytest.mark.parametrize("mode", MODES)
def test_decoders_answer_as_peft(answering: tuple[Path, dict[str, Any]], mode: str) -> None:
    path, oracles = answering
    given = read_adapters([f"my-{form}={path / form}" for form in FORMS])
    with TestClient(create_app(ServiceSettings(path / mode, adapters=given))) as client:
        models = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
        assert models == [mode, *sorted([*given, "small", "wide"])]
        for form, oracle in oracles.items():
            assert complete(client, f"my-{form}", "Hello there") == expected(oracle, "Hello there")


@pytest.mark.parametrize("mode", MODES)
def test_classifiers_answer_as_peft(classifying: tuple[Path, dict[str, Any]], mode: str) -> None:
    path, oracles = classifying
    given = {form: path / form for form in FORMS}
    inputs = text_batch(3, 7)
    tensors = [
        {"name": name, "shape": list(value.shape), "datatype": "INT64", "data": value.flatten().tolist()}
        for name, value in inputs.items()
    ]
    with TestClient(create_app(ServiceSettings(path / mode, adapters=given))) as client:
        for form, oracle in oracles.items():
            answer = client.post(f"/v2/models/{form}/infer", json={"inputs": tensors}).raise_for_status().json()
            with torch.no_grad():
                logits = oracle(**inputs).logits.numpy()
            np.testing.assert_allclose(answer["outputs"][0]["data"], logits.ravel(), atol=1e-4 * abs(logits).max())


def test_files_and_directories_are_one_thing(answering: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A relative path, a link, and the file that export-adapter makes of it; what replaces the export's own says so."""
    path, oracles = answering
    export = shutil.copytree(path / "data", tmp_path / "data")
    (tmp_path / "link").symlink_to(path / "lora")
    file = export_adapter(path / "lora", export, "own")
    moved = shutil.copytree(file.parent, tmp_path / "moved") / file.name
    file.unlink()
    given = {"linked": tmp_path / "link", "file": moved, "small": path / "lora"}
    with pytest.warns(UserWarning, match=f"{path / 'lora'} is served as 'small'"):
        app = create_app(ServiceSettings(export, adapters=given))
    with TestClient(app) as client:
        answers = {complete(client, name, "Hello there") for name in given}
        assert answers == {expected(oracles["lora"], "Hello there")}
    assert not list(export.glob("adapters/linked*"))  # nothing is written into the export


def test_replicas_have_one_conversion(answering: tuple[Path, dict[str, Any]]) -> None:
    """Converted once for all processes, whatever happens to the directory later; gone when they end."""
    path, oracles = answering
    directory = shutil.copytree(path / "gralora", path / "moving")
    settings = ServiceSettings(path / "data", adapters={"new": directory})
    with converted(settings) as same:
        shutil.rmtree(directory)
        file = same.adapters["new"]
        assert file.suffix == ".onnx_adapter"
        with TestClient(create_app(same)) as client:
            assert complete(client, "new", "Hello there") == expected(oracles["gralora"], "Hello there")
    assert not file.exists()


@pytest.fixture
def damaged(answering: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """Return a root of adapters that cannot be served."""
    source = answering[0] / "lora"
    for name in ("no-tensors", "no-config", "cut", "huge", "wider", "method", "files"):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "no-tensors" / "adapter_model.safetensors").unlink()
    (tmp_path / "no-config" / "adapter_config.json").unlink()
    tensors = (tmp_path / "cut" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(tensors[:-8])
    values = load_file(tmp_path / "huge" / "adapter_model.safetensors")
    save_file({k: torch.full_like(v, 3e38) for k, v in values.items()}, tmp_path / "huge" / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "wider" / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    (tmp_path / "method" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "VERA"}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["no-tensors", "no-config", "cut", "huge", "wider", "method", "empty", "text.txt", "missing"]
)
def test_errors_are_those_of_a_load(answering: tuple[Path, dict[str, Any]], damaged: Path, name: str) -> None:
    """The same adapter, given at the start and loaded by a request, is refused with one message."""
    export = answering[0] / "data"
    with pytest.raises(GraloraError) as error:
        create_app(ServiceSettings(export, adapters={"bad": damaged / name}))
    assert isinstance(error.value, ServingError | CheckpointError | ConfigError | ExportError)
    assert str(error.value).startswith("adapter 'bad'")
    assert "gralora-fx-" not in str(error.value)
    with (
        pytest.raises(type(error.value), match="adapter 'bad'"),
        converted(ServiceSettings(export, adapters={"bad": damaged / name})) as same,
    ):
        create_app(same)
    if name in ("huge", "wider", "method", "cut"):  # others are named by the path within the root
        with TestClient(create_app(ServiceSettings(export, adapter_root=damaged))) as client:
            answer = load(client, "bad", name)
            assert answer.status_code == 400
            message = str(error.value).removeprefix("adapter 'bad': ").replace(f"{damaged}/", "")
            assert answer.json()["error"]["message"] == message


@pytest.mark.parametrize("name", ["..", "a/b", "/tmp/x", "", "a" * 300])
def test_names_stay_names(answering: tuple[Path, dict[str, Any]], name: str, tmp_path: Path) -> None:
    path = answering[0]
    before = sorted(tmp_path.rglob("*"))
    settings = ServiceSettings(path / "data", adapters={name: path / "lora"})
    with pytest.raises(ServingError, match="name"):
        create_app(settings)
    with pytest.raises(ServingError, match="name"), converted(settings):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_stays_open_where_an_adapter_cannot_be_loaded(
    answering: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unpatched = answering[0], server.bind
    bound: list[socket.socket] = []

    def bind(host: str, port: int) -> list[socket.socket]:
        bound.extend(unpatched(host, port))
        return bound

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    adapters = {"a": folder / "lora", "b": folder / "missing"}
    options = [f"--adapter={name}={path}" for name, path in adapters.items()]
    with monkeypatch.context() as patched:
        patched.setattr("gralora_fx.service.server.bind", bind)
        result = CliRunner().invoke(app, ["serve", str(folder / "data"), "--port", "0", *options])
    assert isinstance(result.exception, ServingError)
    assert "adapter 'b': there is no adapter at" in str(result.exception)
    assert [one.fileno() for one in bound] == [-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["n" * 300, "a\0b"])
def test_what_cannot_be_a_path_is_named(answering: tuple[Path, dict[str, Any]], given: str) -> None:
    settings = ServiceSettings(answering[0] / "data", adapters={"a": Path(given)})
    with pytest.raises(ServingError, match=r"adapter 'a': .* is not a usable path .*; give an .onnx_adapter file"):
        create_app(settings)


def test_a_merged_export_takes_none(answering: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    export_onnx(trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),)), tmp_path / "net", verify=False)
    settings = ServiceSettings(tmp_path / "net", adapters={"a": answering[0] / "lora"})
    with pytest.raises(ServingError, match="adapter 'a': net takes no adapters"):
        create_app(settings)
    with pytest.raises(ServingError, match="adapter 'a': net takes no adapters"), converted(settings):
        pass
