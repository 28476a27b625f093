"""Tokenizers beside models: none, whole, or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from traces import fresh_trace
from typer.testing import CliRunner

from gralora_fx.cli import app
from gralora_fx.errors import CheckpointError, ExportError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.loading.tokenizers import load_tokenizer


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
