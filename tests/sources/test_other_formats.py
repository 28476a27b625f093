"""Weights that are not floats in safetensors files are named, with a command that converts them."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_oracle import saved_by_peft
from safetensors.torch import load_file
from tiny_models import tiny_model
from traces import fresh_trace
from typer.testing import CliRunner

from gralora_fx import GraloraModel
from gralora_fx.cli import app
from gralora_fx.core.loading.models import load_model, load_streamed
from gralora_fx.errors import CheckpointError, GraloraError, ServingError
from gralora_fx.exporters import merge_checkpoint, to_lora
from gralora_fx.serving import load

NAMED: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda model, _: load_model(model),
    "streamed": lambda model, _: load_streamed(model),
    "merge": lambda model, adapter: merge_checkpoint(model, adapter, model.parent / "merged"),
    "export": lambda model, _: command("export", "--model", model, "--output", model.parent / "onnx"),
    "inspect": lambda model, _: command("inspect", "--model", model),
}


def command(*arguments: Any) -> None:
    """Run a command as the command line does; its error is raised."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None:
        raise result.exception


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    saved_by_peft("llama", path, r=4, target_modules=["q_proj"])
    return path


def run(error: BaseException, directory: Path) -> None:
    """Run the command that an error ends in, in this process, which has imported PyTorch already."""
    option, code = shlex.split(str(error).partition(": python ")[2])
    assert option == "-c"
    with contextlib.chdir(directory):
        exec(compile(code, "command", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("way", NAMED)
def test_a_gguf_file_is_named_by_whatever_takes_a_model(
    way: str, has_config: bool, base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tiny.gguf").write_bytes(b"GGUF")
    if has_config:
        shutil.copy(base / "config.json", model)
    message = r"tiny.gguf is a GGUF file, which is not read; give the directory 'converted' .*: python -c '.*GgufConfig"
    for given in (model, model / "tiny.gguf"):
        with pytest.raises(GraloraError, match=message) as caught:
            NAMED[way](given, adapter)
        code = shlex.split(str(caught.value).partition(": python ")[2])[1]
        compile(code, "command", "exec")
        assert f'"{model}", "tiny.gguf", "converted"' in code
    assert transformers.GgufConfig(dequantize=True).dequantize  # what the command gives


def test_a_gguf_file_is_no_export(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ServingError, match=r"which holds tiny\.gguf, without config\.json; give the directory of an exp"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("gptq", "dequantize_model"),
        ("awq", "dequantize_model"),
        ("compressed-tensors", "CompressedTensorsConfig(dequantize=True)"),
        ("bitsandbytes", ".dequantize()"),
        ("quark", None),
    ],
)
@pytest.mark.parametrize("way", NAMED)
def test_a_quantized_checkpoint_is_named_with_the_command_that_converts_it(
    way: str, method: str, code: str | None, base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": method}}))
    with pytest.raises(GraloraError, match=r"is quantized by .*; give the float checkpoint that it was made") as caught:
        NAMED[way](model, adapter)
    text = str(caught.value).partition(": python ")[2]
    assert bool(text) == (code is not None)
    if code is not None:
        assert code in shlex.split(text)[1]


@pytest.mark.parametrize("way", ["streamed", "merge"])
def test_a_models_pickle_is_named_and_the_command_writes_safetensors(
    way: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds its weights as pytorch_model\.bin, a pickle") as caught:
        NAMED[way](model, adapter)
    if way == "streamed":
        run(caught.value, tmp_path)
        NAMED[way](model, adapter)
        assert load_file(model / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_an_adapters_pickle_is_named_and_the_command_writes_safetensors(adapter: Path, tmp_path: Path) -> None:
    saved = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    expected = load_file(saved / "adapter_model.safetensors")
    torch.save(expected, saved / "adapter_model.bin")
    (saved / "adapter_model.safetensors").unlink()
    ways: tuple[Callable[[], Any], ...] = (
        lambda: GraloraModel.from_pretrained(fresh_trace("llama"), saved),
        lambda: to_lora(saved, tmp_path / "lora"),
        lambda: command("to-lora", "--adapter", saved, "--output", tmp_path / "lora"),
    )
    for way in ways:
        with pytest.raises(CheckpointError, match=r"holds adapter_model\.bin, .* without running any") as caught:
            way()
    run(caught.value, tmp_path)
    written = load_file(saved / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())
    to_lora(saved, tmp_path / "lora")
