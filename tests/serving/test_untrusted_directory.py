"""Export directories may bring neither links out of them nor a tokenizer's own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damaged_exports import forget_digests
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.fold.source_export import open_export
from gralora_fx.format.export_checks import check_files
from gralora_fx.format.manifest import read_manifest
from gralora_fx.serving import load


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "onnx"
    model = tiny_model("llama", eos_token_id=[2, 3], bos_token_id=1)
    export_onnx(trace(model, task="text-generation-with-past"), path, verify=False)
    return path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of an export whose manifest knows no sizes, so that what is read is refused and not its length."""
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    check_files(folder, read_manifest(folder), digests=True)
    forget_digests(folder)
    return folder


@pytest.mark.parametrize("name", ["model.onnx", "model_rows.onnx", "model.onnx_data"])
def test_a_model_that_is_a_link_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ServingError, match="is a link; copy the file itself"):
        load(folder)


@pytest.mark.parametrize("records_files", [True, False])
@pytest.mark.parametrize("name", ["model.onnx", "model_rows.onnx"])
def test_a_model_over_another_file_of_weights_than_the_exports_is_refused(
    exported: Path, tmp_path: Path, name: str, records_files: bool
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    other = "other.onnx_data"  # as long as the export's own, so that no size differs
    shutil.copyfile(folder / "model.onnx_data", folder / other)
    (folder / name).write_bytes((folder / name).read_bytes().replace(b"model.onnx_data", other.encode()))
    if not records_files:
        forget_digests(folder)
    message = f"{name} takes its weights from {other}, which is not a file of the export's weights"
    with pytest.raises(ServingError, match=message):
        load(folder)(input_ids=[[3, 4]]) if name == "model.onnx" else load(folder)
    with pytest.raises(ExportError, match=message):
        open_export(folder)


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
