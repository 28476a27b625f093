"""Links in an export: those of the hub's cache are followed, and no others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.format.adapter_paths import own_adapters
from gralora_fx.serving import load


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("links") / "onnx"
    export_onnx(trace(tiny_model("bert"), task="feature-extraction"), path, verify=False)
    return path


def snapshot(exported: Path, repository: Path) -> Path:
    """Return the export as huggingface_hub lays out a repository that it has downloaded."""
    folder, blobs = repository / "snapshots" / "abc", repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for file in exported.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (folder / file.name).symlink_to(os.path.join("..", "..", "blobs", f"blob-{file.name}"))
    return folder


def test_a_snapshot_of_the_hubs_cache_is_read(exported: Path, tmp_path: Path) -> None:
    folder = snapshot(exported, tmp_path / "models--a--b")
    ids = [[5, 6, 7]]
    assert (load(folder, check=True)(input_ids=ids)[0] == load(exported)(input_ids=ids)[0]).all()


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_snapshots_link_elsewhere_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    folder = snapshot(exported, tmp_path / "models--a--b")
    (folder / name).unlink()
    (folder / name).symlink_to(exported / name)
    with pytest.raises(ServingError, match=f"{name} is a link; copy the file itself"):
        load(folder)


def test_a_blob_that_leads_elsewhere_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = snapshot(exported, tmp_path / "models--a--b")
    blob = tmp_path / "models--a--b" / "blobs" / "blob-model.onnx_data"
    blob.unlink()
    blob.symlink_to(exported / "model.onnx_data")
    with pytest.raises(ServingError, match=r"model.onnx_data is a link"):
        load(folder)
    blob.unlink()
    os.link(shutil.copy(exported / "model.onnx_data", tmp_path / "data"), blob)
    with pytest.raises(ServingError, match=r"model.onnx_data is a link.*2 names"):
        load(folder)


def test_blobs_that_are_a_link_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = snapshot(exported, tmp_path / "models--a--b")
    (tmp_path / "models--a--b" / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "models--a--b" / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServingError, match="is a link"):
        load(folder)


def test_own_adapters_are_not_links(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    for name in ("b", "a"):
        (tmp_path / "adapters" / f"{name}.onnx_adapter").touch()
    assert list(own_adapters(tmp_path, ExportError)) == ["a", "b"]
    (tmp_path / "adapters" / "c.onnx_adapter").symlink_to("a.onnx_adapter")
    for error in (ExportError, ServingError):
        with pytest.raises(error, match=r"c.onnx_adapter is a link; copy the file itself"):
            own_adapters(tmp_path, error)
