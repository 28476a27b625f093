"""Tokenizers beside models: none, whole, or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fresh_process import fresh_process
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from traces import fresh_trace
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gralora_fx.cli import app
from gralora_fx.core.loading.tokenizers import load_tokenizer
from gralora_fx.errors import CheckpointError, ExportError, ServingError
from gralora_fx.exporters import export_onnx


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model("bert").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def damaged(base: Path, copy: Path, file: str, content: bytes | None) -> Path:
    shutil.copytree(base, copy)
    (copy / file).write_bytes((base / file).read_bytes()[:60] if content is None else content)
    return copy


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"null", b"\xff\xfe{}"])
def test_a_damaged_file_is_named(base: Path, tmp_path: Path, file: str, content: bytes | None) -> None:
    path = damaged(base, tmp_path / "base", file, content)
    for error in (CheckpointError, ServingError):
        with pytest.raises(error, match=f"{file} (cannot be read as JSON|holds|is empty)") as caught:
            load_tokenizer(path, error)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", b"{}"), ("spiece.model", b"no"), ("vocab.txt", b"\xff\xfe\0"), ("merges.txt", b"#version\n")],
)
def test_files_that_hold_no_tokenizer_are_named(tmp_path: Path, file: str, content: bytes) -> None:
    model = {"spiece.model": "t5", "merges.txt": "gpt2"}.get(file, "bert")
    tiny_model(model).config.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"the tokenizer of .* cannot be loaded from {file} "):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_no_bytes_is_named(tmp_path: Path) -> None:
    tiny_model("bert").config.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"vocab.txt is empty; copy it again"):
        load_tokenizer(tmp_path)


def test_a_model_alone_has_no_tokenizer(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer("/no/such/directory") is None
    assert load_tokenizer("owner/no-such-repository") is None


def test_an_export_with_a_damaged_tokenizer_writes_nothing(base: Path, tmp_path: Path) -> None:
    path = damaged(base, tmp_path / "base", "tokenizer.json", None)
    arguments = ["export", "--model", str(path), "--output", str(tmp_path / "onnx"), "--no-verify"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CheckpointError)
    assert "load  " not in result.stderr  # it is told before the model is loaded
    with pytest.raises(ExportError, match=r"tokenizer.json cannot be read as JSON"):
        export_onnx(fresh_trace("bert"), tmp_path / "onnx", tokenizer=path, verify=False)
    assert not (tmp_path / "onnx").exists()
    result = CliRunner().invoke(app, [*arguments, "--no-tokenizer"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "onnx" / "tokenizer.json").exists()


@pytest.mark.parametrize("model", ["bert", "llama", "mistral", "gpt2"])
@pytest.mark.parametrize("named", ["TokenizersBackend", "BertTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", None])
def test_its_class_is_that_which_transformers_takes(base: Path, tmp_path: Path, model: str, named: str | None) -> None:
    path = shutil.copytree(base, tmp_path / "base")
    tiny_model(model).config.save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    settings.pop("tokenizer_class")
    settings |= {} if named is None else {"tokenizer_class": named}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    found, expected = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert type(found) is type(expected)
    assert found is not None
    assert found.get_vocab() == expected.get_vocab()
    assert found.init_kwargs == expected.init_kwargs


def test_a_tokenizer_loads_without_what_models_need() -> None:
    modules = fresh_process().after_tokenizer
    assert "gralora_fx.core.loading.tokenizers" in modules
    assert {"transformers.models.bert", "transformers.core_model_loading", "sympy"}.isdisjoint(modules)
