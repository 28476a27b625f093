"""Requests may load files of adapters within the root alone, however their paths are spelled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_exports import decoders

from gralora_fx.errors import ConfigError, GraloraError, ServingError
from gralora_fx.exporters import export_adapter
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.run.generate.request_errors import AdapterNotFoundError
from gralora_fx.service.adapter_store.adapter_root import AdapterRoot


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with PEFT's `wide` and the export `data`."""
    folder = tmp_path_factory.mktemp("root")
    decoders(folder, "data")
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    shutil.copytree(made / "data" / "adapters", folder)
    shutil.copytree(made / "wide", folder / "peft")
    return folder


def copied(root: Path, text: str, made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return AdapterRoot.of(root).copy(text, "name", made / "data", folder)


@pytest.mark.parametrize("spell", [str, lambda text: f"./{text}"])
def test_a_file_is_copied_with_its_record(root: Path, made: Path, tmp_path: Path, spell: Callable[[str], str]) -> None:
    file = copied(root, spell("wide.onnx_adapter"), made, tmp_path)
    assert file.read_bytes() == (root / "wide.onnx_adapter").read_bytes()
    assert record_path(file).read_bytes() == (root / "wide.json").read_bytes()
    assert copied(root, str(root / "wide.onnx_adapter"), made, tmp_path).is_file()


@pytest.mark.parametrize("text", ["peft", "peft/adapter_model.bin", "adapter.pt"])
def test_a_pickle_is_named_as_such(text: str, root: Path, made: Path, tmp_path: Path) -> None:
    (root / "peft" / "adapter_model.safetensors").rename(root / "peft" / "adapter_model.bin")
    shutil.copy(root / "peft" / "adapter_model.bin", root / "adapter.pt")
    with pytest.raises(ServingError, match="is pickled; only safetensors is read: save it again") as told:
        copied(root, text, made, tmp_path)
    name = "adapter.pt" if text == "adapter.pt" else "peft/adapter_model.bin"
    assert str(told.value).startswith(f"'{name}' is pickled")


def test_a_root_behind_a_link_is_the_operators_choice(root: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    for text in ("wide.onnx_adapter", str(tmp_path / "link" / "wide.onnx_adapter"), str(root / "wide.onnx_adapter")):
        assert copied(tmp_path / "link", text, made, tmp_path).is_file()


def test_a_peft_directory_is_converted_as_by_export_adapter(root: Path, made: Path, tmp_path: Path) -> None:
    file = copied(root, "peft", made, tmp_path)
    export = Path(shutil.copytree(made / "data", tmp_path / "export"))
    reference = export_adapter(root / "peft", export, "name")
    assert file.read_bytes() == reference.read_bytes()
    assert record_path(file).read_bytes() == record_path(reference).read_bytes()


def test_links_within_the_root_are_followed(root: Path, made: Path, tmp_path: Path) -> None:
    (root / "snapshots").mkdir()
    (root / "snapshots" / "x").symlink_to("../peft")
    (root / "again.onnx_adapter").symlink_to("wide.onnx_adapter")
    (root / "again.json").symlink_to(root / "wide.json")
    assert copied(root, "snapshots/x", made, tmp_path).is_file()
    assert copied(root, "again.onnx_adapter", made, tmp_path).is_file()


@pytest.mark.parametrize(
    "text",
    ["", "..", "../root/wide.onnx_adapter", "peft/../wide.onnx_adapter", "a\0b", "\ud800", "a\nb", "/etc/passwd", "/"],
)
def test_paths_that_lead_out_are_refused(root: Path, made: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ServingError, match="adapter root") as caught:
        copied(root, text, made, tmp_path)
    assert not isinstance(caught.value, AdapterNotFoundError)  # it says nothing about files elsewhere


def linked(link: Callable[[Path, Path], None], name: str) -> Callable[[Path, Path], None]:
    """Make a file of the adapter a link to one outside."""

    def change(root: Path, outside: Path) -> None:
        (root / name).rename(outside / "file")
        link(outside / "file", root / name)

    return change


def linked_folder(root: Path, outside: Path) -> None:
    (root / "peft").rename(outside / "peft")
    (root / "peft").symlink_to(outside / "peft")


def pipe(root: Path, outside: Path) -> None:
    (root / "wide.onnx_adapter").unlink()
    os.mkfifo(root / "wide.onnx_adapter")


def folder_for_file(root: Path, outside: Path) -> None:
    (root / "peft" / "adapter_config.json").unlink()
    (root / "peft" / "adapter_config.json").mkdir()


FILES = ("wide.onnx_adapter", "wide.json", "peft/adapter_model.safetensors", "peft/adapter_config.json")
CHANGES: list[Any] = [(linked(os.symlink, name), name, "link out of the adapter root") for name in FILES]
CHANGES += [(linked(os.link, name), name, "is a hard link") for name in FILES]
CHANGES += [(linked_folder, "peft/", "link out of the adapter root"), (pipe, FILES[0], "is not a regular file")]
CHANGES += [(folder_for_file, "peft/", "is not a regular file")]


@pytest.mark.parametrize(("change", "name", "message"), CHANGES)
def test_files_that_lead_out_are_refused(
    root: Path, made: Path, tmp_path: Path, change: Callable[[Path, Path], None], name: str, message: str
) -> None:
    (tmp_path / "outside").mkdir()
    change(root, tmp_path / "outside")
    text = "peft" if name.startswith("peft/") else "wide.onnx_adapter"
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ServingError, match=message):
        copied(root, text, made, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_what_is_no_adapter_is_named(root: Path, made: Path, tmp_path: Path) -> None:
    (root / "loop").symlink_to("loop")
    for text, message, kind in (
        ("missing", "there is no adapter at 'missing'", AdapterNotFoundError),
        ("wide.json", "is neither an .onnx_adapter file nor a directory", ServingError),
        ("wide.onnx_adapter/x", "cannot be read", ServingError),
        ("x" * 300, "cannot be read", ServingError),
        ("loop", "loop of links|cannot be read", ServingError),
        (".", "adapter_config.json", GraloraError),
    ):
        with pytest.raises(kind, match=message):
            copied(root, text, made, tmp_path)
    (root / "wide.json").unlink()
    with pytest.raises(AdapterNotFoundError, match=r"wide.json"):
        copied(root, "wide.onnx_adapter", made, tmp_path)


def test_a_root_is_a_directory(root: Path, tmp_path: Path) -> None:
    for path in (root / "wide.json", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="the adapter root"):
            AdapterRoot.of(path)
    for path in (tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"is not a usable path .*; give the directory of adapters"):
            AdapterRoot.of(path)


def test_a_file_that_changes_meanwhile_is_refused(
    root: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = np.fromfile

    def slow(*arguments: Any) -> Any:
        content = read(*arguments)
        os.utime(root / "wide.onnx_adapter", (1, 1))
        return content

    monkeypatch.setattr(np, "fromfile", slow)
    with pytest.raises(ServingError, match=r"wide.onnx_adapter was changed while it was read"):
        copied(root, "wide.onnx_adapter", made, tmp_path)
