"""`genai_config.json` holds what an export writes, or nothing is generated: onnxruntime-genai does what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged_exports import forget_digests
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.runtime.export_files import check_files
from gralora_fx.runtime.manifest import read_manifest
from gralora_fx.serving import load
from gralora_fx.serving.http.app import create_app
from gralora_fx.serving.http.settings import ServiceSettings


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "onnx"
    model = tiny_model("llama", eos_token_id=[2, 3], bos_token_id=1)
    export_onnx(trace(model, task="text-generation-with-past"), path, verify=False)
    return path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of an export whose manifest knows no sizes, so that what is read is refused and not its length."""
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    check_files(folder, read_manifest(folder), digests=True)
    forget_digests(folder)
    return folder


def refused(folder: Path, text: str | bytes, message: str) -> None:
    (folder / "genai_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ServingError, match=message):
        load(folder).generate([5], max_new_tokens=1)


def put(*path: str) -> Callable[[dict[str, Any], Any], None]:
    def change(config: dict[str, Any], value: Any) -> None:
        for name in path[:-1]:
            config = config.setdefault(name, {})
        config[path[-1]] = value

    return change


OPTIONS = ("model", "decoder", "session_options")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*OPTIONS, "custom_ops_library"), "evil.so"),
        ((*OPTIONS, "enable_profiling"), "/tmp/profile"),
        ((*OPTIONS, "intra_op_num_threads"), 1),
        ((*OPTIONS, "config_entries"), {"session.load_model_format": "ORT"}),
        ((*OPTIONS, "provider_options"), [{"cuda": {"path": "/lib"}}]),
        (("model", "decoder", "filename"), "../model.onnx"),
        (("model", "decoder", "filename"), "/etc/hostname"),
        (("model", "decoder", "filename"), "other.onnx"),
        (("model", "decoder", "pipeline"), []),
        (("model", "decoder", "inputs", "input_ids"), "attention_mask"),
        (("model", "decoder", "num_hidden_layers"), "2"),
        (("model", "vision", "filename"), "/etc/hostname"),
        (("model", "type"), "whisper"),
        (("model", "eos_token_id"), None),
        (("model", "vocab_size"), True),
        (("search", "past_present_share_buffer"), 1),
        (("search", "chunk_size"), 4),
        (("engine",), {}),
    ],
)
def test_what_no_export_writes_is_refused_by_its_key(folder: Path, path: tuple[str, ...], value: object) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    put(*path)(config, value)
    named = ".".join(path[:2] if path[1:2] == ("vision",) else path)
    refused(folder, json.dumps(config), rf"genai_config.json: {re.escape(named)} is ")


def test_a_key_that_stands_twice_is_refused(folder: Path) -> None:
    """JSON's readers differ: Python's takes the last of two, onnxruntime-genai acts on both."""
    text = (folder / "genai_config.json").read_text()
    hidden = '{"model": {"decoder": {"session_options": {"enable_profiling": "profile"}}}, '
    refused(folder, hidden + text.lstrip()[1:], "cannot be read .model is twice in an object")
    assert not list(folder.glob("profile*"))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"model": NaN}', b"[" * 100_000, b"5", b"{}"])
def test_a_damaged_file_is_refused(folder: Path, text: bytes) -> None:
    refused(folder, text, "genai_config.json")


def test_a_missing_key_and_a_missing_file_are_named(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    del config["model"]["context_length"]
    refused(folder, json.dumps(config), r"genai_config.json: model.context_length is missing")
    (folder / "genai_config.json").unlink()
    with pytest.raises(ServingError, match=r"genai_config.json is missing"):
        load(folder).generate([5])


def test_a_model_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ServingError, match="is a link; copy the file itself"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_tokenizers_own_code_is_not_run(folder: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "evil.py").write_text("print('it ran')\nclass Tokenizer: pass\n")
    (folder / "tokenizer_config.json").write_text("{}")
    fields = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**fields, "auto_map": code}))
    with pytest.raises(ServingError, match="tokenizer"):
        load(folder).generate("abc")
    assert "it ran" not in capfd.readouterr().out


def test_libraries_are_refused_before_anything_is_generated(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    put(*OPTIONS, "custom_ops_library")(config, "evil.so")
    (folder / "genai_config.json").write_text(json.dumps(config))
    for open_export in (load, lambda path: create_app(ServiceSettings(path))):
        with pytest.raises(ServingError, match="custom_ops_library is not a key that an export writes"):
            open_export(folder)


@pytest.mark.parametrize("name", ["x.onnx_adapter", "x.json", ""])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_adapters_that_are_links_are_refused(
    folder: Path, tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "adapters").mkdir()
    for file in ("x.onnx_adapter", "x.json"):
        (folder / "adapters" / file).write_text("any")
    if not name:
        link = os.symlink  # a directory has no hard links
    (folder / "adapters" / name).rename(outside / "target")
    link(outside / "target", folder / "adapters" / name)
    for open_export in (load, lambda path: create_app(ServiceSettings(path))):
        with pytest.raises(ServingError, match=f"{name or 'adapters'} is a link; copy the"):
            open_export(folder)
