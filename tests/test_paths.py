"""Every argument that takes a path: what cannot be one is refused by our error, and nothing is written."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.cli import app
from gralora_fx.core.loading.tokenizers import load_tokenizer
from gralora_fx.core.methods import read_config
from gralora_fx.errors import GraloraError
from gralora_fx.exporters import (
    export_adapter,
    export_onnx,
    fold_onnx,
    merge_checkpoint,
    to_lora,
    verify_onnx,
)
from gralora_fx.serving import load

BAD = {
    "zero byte": "bad\0name",
    "zero byte below": "folder/bad\0name/file",
    "empty": "",
    "blank": "  ",
    "long name": "n" * 300,
    "long name below": "missing/" + "n" * 300 + "/x",
    "long path": "/".join(["folder"] * 1000),
    "surrogate": "bad\ud800name",
    "bytes": b"bytes",
    "number": 7,
    "nothing": None,
}


class Made:
    """The files that the functions need beside a path."""

    def __init__(self, folder: Path) -> None:
        network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.traced = trace(network, (torch.randn(2, 8),))
        self.model = rewrite(self.traced, GraloraConfig(r=4, target_modules=["0"], init_weights=False))
        self.adapter, self.onnx, self.base = folder / "adapter", folder / "onnx", folder / "base"
        self.exported, self.file = folder / "data", folder / "file"
        self.model.save_pretrained(self.adapter)
        export_onnx(self.traced, self.onnx, verify=False)
        export_onnx(self.model, self.exported, adapters="data", verify=False)
        self.base.mkdir()
        save_file({"0.weight": torch.randn(8, 8)}, self.base / "model.safetensors")
        (self.base / "config.json").write_text("{}")
        self.file.write_text("text")
        self.served = load(self.exported)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


READING: dict[str, Callable[[Made, Any], object]] = {
    "GraloraModel.from_pretrained": lambda made, path: GraloraModel.from_pretrained(made.traced, path),
    "GraloraModel.load_adapter": lambda made, path: made.model.load_adapter(path, "other"),
    "GraloraConfig.from_pretrained": lambda made, path: GraloraConfig.from_pretrained(path),
    "LoraConfig.from_pretrained": lambda made, path: LoraConfig.from_pretrained(path),
    "read_config": lambda made, path: read_config(path),
    "verify_onnx": lambda made, path: verify_onnx(path, made.model),
    "export_adapter: adapter": lambda made, path: export_adapter(path, made.exported, "x"),
    "export_adapter: export": lambda made, path: export_adapter(made.adapter, path, "x"),
    "fold_onnx: export": lambda made, path: fold_onnx(path, made.adapter, made.onnx.parent / "new"),
    "fold_onnx: adapter": lambda made, path: fold_onnx(made.onnx, path, made.onnx.parent / "new"),
    "to_lora": lambda made, path: to_lora(path, made.onnx.parent / "new"),
    "merge_checkpoint: base": lambda made, path: merge_checkpoint(path, made.adapter, made.onnx.parent / "new"),
    "merge_checkpoint: adapter": lambda made, path: merge_checkpoint(made.base, path, made.onnx.parent / "new"),
    "load": lambda made, path: load(path),
    "OrtModel.load_adapter": lambda made, path: made.served.load_adapter("x", path),
}
OPTIONAL: dict[str, Callable[[Made, Any], object]] = {  # None is one of their values
    "fold_onnx: base": lambda made, path: fold_onnx(made.onnx, made.adapter, made.onnx.parent / "new", base=path),
    "export_onnx: tokenizer": lambda made, path: export_onnx(made.traced, made.onnx.parent / "new", tokenizer=path),
    "export_onnx: dump": lambda made, path: export_onnx(made.traced, made.onnx.parent / "new", dump=path, verify=False),
}
WRITING: dict[str, Callable[[Made, Any], object]] = {
    "GraloraModel.save_pretrained": lambda made, path: made.model.save_pretrained(path),
    "GraloraConfig.save_pretrained": lambda made, path: GraloraConfig(r=4).save_pretrained(path),
    "export_onnx": lambda made, path: export_onnx(made.traced, path, verify=False),
    "fold_onnx": lambda made, path: fold_onnx(made.onnx, made.adapter, path),
    "to_lora": lambda made, path: to_lora(made.adapter, path),
    "merge_checkpoint": lambda made, path: merge_checkpoint(made.base, made.adapter, path),
}
FILES: dict[str, Callable[[Made, Any], object]] = {
    "to_html": lambda made, path: made.model.to_html(path),
    "to_svg": lambda made, path: made.model.to_svg(path),
}


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", [*READING, *OPTIONAL, *WRITING, *FILES])
def test_what_cannot_be_a_path_is_refused(
    name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = names(made.onnx.parent)
    every = READING | OPTIONAL | WRITING | FILES
    for call in [function for key, function in every.items() if key == name]:
        for kind, path in BAD.items():
            if path is None and name in OPTIONAL:
                continue
            with pytest.raises(GraloraError) as caught:
                call(made, path)
            assert "embedded null" not in str(caught.value), kind
            expected = r"usable path|cannot write|must be|not a name|is empty|is not a tokenizer"
            assert re.search(expected, str(caught.value)), kind
    assert names(made.onnx.parent) == before
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", [*READING, *OPTIONAL, *WRITING])
def test_a_file_is_no_directory(name: str, made: Made) -> None:
    before = names(made.onnx.parent)
    for call in [function for key, function in (READING | OPTIONAL | WRITING).items() if key == name]:
        with pytest.raises(GraloraError, match="file"):
            call(made, made.file)
    assert names(made.onnx.parent) == before


@pytest.mark.parametrize("name", FILES)
def test_a_directory_is_no_file(name: str, made: Made) -> None:
    with pytest.raises(GraloraError, match=r"Is a directory.; give the path of a file"):
        FILES[name](made, made.onnx)


def test_a_tokenizer_that_cannot_be_a_path() -> None:
    for path in ("bad\0name", "", "n" * 300):
        with pytest.raises(GraloraError, match="is not a usable path"):
            load_tokenizer(path)


def test_the_command_line_says_the_same(made: Made, tmp_path: Path) -> None:
    adapter = ["--adapter", str(made.adapter)]
    for arguments in (
        ["to-lora", *adapter, "--output", "n" * 300],
        ["merge", "--model", "n" * 300, *adapter, "--output", str(tmp_path / "new")],
        ["fold", "--onnx", "n" * 300, *adapter, "--output", str(tmp_path / "new")],
        ["export-adapter", "--onnx", "n" * 300, *adapter],
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, GraloraError), result.exception
        assert "is not a usable path (File name too long)" in str(result.exception)


_UNSEARCHABLE = """
import os, sys
from pathlib import Path
from gralora_fx.errors import ExportError
from gralora_fx.exporters.artifact.staging import check_output
from gralora_fx.format.manifest import read_manifest
from gralora_fx.base.sources.model_files import usable_directory, usable_file, usable_path

os.chmod(sys.argv[1], 0)
if os.geteuid() == 0:
    os.seteuid(65534)
usable_path("other", ExportError)
for check in (usable_path, usable_directory, usable_file, lambda path, _: check_output(path), read_manifest):
    try:
        check(Path("locked/inside"), ExportError)
    except ExportError as error:
        print(error)
"""


def test_a_directory_that_may_not_be_searched() -> None:
    # those of pytest, and maybe those of $TMPDIR, are searched by their owner alone
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        locked = Path(folder, "locked")
        locked.mkdir()
        Path(folder).chmod(0o755)
        command = [sys.executable, "-c", _UNSEARCHABLE, "locked"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        locked.chmod(0o755)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert all("locked/inside is not a usable path (Permission denied); give " in line for line in lines), lines
