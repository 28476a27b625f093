"""The manifest knows every file of an export: loading compares sizes, on request digests, and names what differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import run
from tiny_tokenizers import tiny_tokenizer
from torch import nn
from typer.main import get_command

from gralora_fx import trace
from gralora_fx.base.features import parts
from gralora_fx.cli import app
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.format import manifest as manifest_module
from gralora_fx.format.export_checks import check_files
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.serving import load


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "onnx"
    traced = trace(nn.Sequential(nn.Linear(8, 200)).eval(), (torch.randn(1, 8),))
    export_onnx(traced, path, tokenizer=tiny_tokenizer(), verify=False)
    return path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def test_the_manifest_holds_size_and_digest_of_every_other_file(exported: Path) -> None:
    files = json.loads((exported / "gralora_export.json").read_text())["files"]
    assert set(files) == {path.name for path in exported.iterdir()} - {"gralora_export.json"}
    assert {"model.onnx", "model.onnx_data", "tokenizer.json"} <= set(files)
    for name, facts in files.items():
        content = (exported / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.quick
def test_an_untouched_export_passes_and_is_counted(exported: Path) -> None:
    assert check_files(exported, read_manifest(exported), digests=True) == len(list(exported.iterdir())) - 1
    assert load(exported, check=True)(input=torch.zeros(1, 8))[0].shape == (1, 200)


@pytest.mark.parametrize(("quantize", "zero_points"), [("int4", False), ("int8-dynamic", None)])
def test_an_older_export_that_does_not_say_has_no_zero_points(
    quantize: Any, zero_points: bool | None, tmp_path: Path
) -> None:
    traced = trace(nn.Sequential(nn.Linear(32, 8)).eval(), (torch.randn(1, 32),))
    export_onnx(traced, tmp_path, quantize=quantize, verify=False)
    path = tmp_path / "gralora_export.json"
    fields = json.loads(path.read_text())
    assert fields["quantization"].pop("zero_points") is (True if quantize == "int4" else None)
    path.write_text(json.dumps(fields))
    quantization = read_manifest(tmp_path).quantization
    assert quantization is not None
    assert quantization.zero_points is zero_points
    load(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.onnx_data", "tokenizer.json"])
def test_one_flipped_bit_is_found_by_its_digest_alone(folder: Path, name: str) -> None:
    flip(folder / name)
    load(folder)  # of the same size, and not read through
    with pytest.raises(ServingError, match=f"is not what was exported: {name} has another SHA-256"):
        load(folder, check=True)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "model.onnx_data").unlink(), "model.onnx_data is missing"),
    (lambda folder: os.truncate(folder / "model.onnx_data", 100), r"model.onnx_data has 100 bytes instead of \d"),
    (
        lambda folder: os.truncate(folder / "model.onnx_data", 10**7),
        r"model.onnx_data has 10,000,000 bytes instead of \d",
    ),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_sizes_are_compared_at_every_load(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ServingError, match=message):
        load(folder)


def test_every_file_that_differs_is_named_at_once(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    flip(folder / "model.onnx")
    with pytest.raises(ExportError, match=r"model.onnx has another SHA-256 .*; tokenizer.json is missing"):
        check_files(folder, read_manifest(folder), digests=True)


def test_files_that_nothing_reads_may_be_added(folder: Path) -> None:
    (folder / "README.md").write_text("a model card")
    (folder / ".gitattributes").write_text("")
    load(folder, check=True)
    (folder / "special_tokens_map.json").write_text("{}")
    load(folder)  # a tokenizer may be saved into an export later
    with pytest.raises(ServingError, match=r"special_tokens_map.json is not in the manifest, but would be read"):
        load(folder, check=True)


def rewrite_manifest(folder: Path, files: object) -> None:
    manifest = {**json.loads((folder / "gralora_export.json").read_text()), "files": files}
    if files is None:
        del manifest["files"]
    (folder / "gralora_export.json").write_text(json.dumps(manifest))


def test_an_export_made_before_digests_loads_and_says_that_it_has_none(folder: Path) -> None:
    rewrite_manifest(folder, None)
    load(folder)
    with pytest.raises(ServingError, match="has no digests of its files; export the model again to get them"):
        load(folder, check=True)


@pytest.mark.parametrize(
    "files",
    [
        [],
        {"../secret": {"size": 1, "sha256": "00"}},
        {"/etc/hostname": {"size": 1, "sha256": "00"}},
        {"model.onnx": 5},
        {"model.onnx": {"size": 5}},
        {"model.onnx": {"size": True, "sha256": "00"}},
    ],
)
def test_a_manifest_of_another_shape_is_refused(folder: Path, files: object) -> None:
    rewrite_manifest(folder, files)
    with pytest.raises(ServingError, match="does not describe its files as an export does"):
        load(folder)


# -- the command line --------------------------------------------------------------------------------------------------


def test_verification_from_python_compares_the_files_first(folder: Path) -> None:
    """A comparison of outputs need not see a changed byte, and a truncated file fails in the runtime's words."""
    model = trace(nn.Sequential(nn.Linear(8, 200)).eval(), (torch.randn(1, 8),))
    os.truncate(folder / "model.onnx_data", 100)
    with pytest.raises(ExportError, match=r"is not what was exported: model.onnx_data has 100 bytes instead of"):
        verify_onnx(folder, model)


def test_verify_files_needs_no_model_and_names_the_file(folder: Path) -> None:
    command = ("verify", "--files", "--output", folder)
    done = run(*command)
    assert (done.status, done.stdout) == (0, f"4 files of {folder} are unchanged since the export\n")
    flip(folder / "model.onnx_data")
    done = run(*command)
    assert (done.status, "model.onnx_data has another SHA-256" in done.error) == (1, True)
    done = run(*command, "--model", "x")
    assert (done.status, "--model would have no effect" in done.error) == (1, True)


def test_files_are_verified_without_torch(exported: Path) -> None:
    script = (
        "import sys; from gralora_fx.format.export_checks import check_files; "
        "from gralora_fx.format.manifest import read_manifest; "
        f"check_files({str(exported)!r}, read_manifest({str(exported)!r}), digests=True); "
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# -- its fields --------------------------------------------------------------------------------------------------------


def test_a_manifest_is_written_as_it_was_read(exported: Path) -> None:
    assert read_manifest(exported).to_json() == (exported / "gralora_export.json").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": None}, "has no schema_version, so it is not the manifest of an export"),
        ({"schema_version": "1"}, "has no schema_version, so it is not the manifest of an export"),
        ({"schema_version": 2}, "has schema 2, newer than 1; update gralora-fx"),
        ({"schema_version": 0}, "has schema 0, older than 1; export again with gralora-fx export --model MODEL"),
        ({"precision": None}, "precision is None, which no export writes; export the model again"),
        ({"precision": "fp8"}, "precision is 'fp8', which no export writes"),
        ({"task": 5}, "task is 5, which no export writes"),
        ({"position_offset": True}, "position_offset is True, which no export writes"),
        ({"adapters": {"default": {"config": []}}}, r"adapters.default.config is \[\], which no export writes"),
        ({"adapters": {"default": {"config": {}}}}, "adapters.default.sha256 is missing"),
        ({"quantization": {"kind": "int4"}}, "quantization.block_size is missing; export the model again"),
        ({"sites": [{"path": "0"}]}, "sites.0.kind is missing"),
        ({"passes": [1]}, "passes is 1, which no export writes"),
    ],
)
def test_a_field_of_another_type_is_named(folder: Path, fields: dict[str, object], message: str) -> None:
    path = folder / "gralora_export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ExportError, match=message):
        read_manifest(folder)
    with pytest.raises(ServingError, match=message):
        load(folder)


def test_what_an_export_may_lack_has_its_meaning(folder: Path) -> None:
    path = folder / "gralora_export.json"
    known = json.loads(path.read_text())
    optional = ("files", "position_offset", "quantization", "logits", "passes", "verification", "base_fingerprint")
    path.write_text(json.dumps({name: value for name, value in known.items() if name not in optional}))
    manifest = read_manifest(folder)
    assert (manifest.files, manifest.position_offset, manifest.quantization, manifest.logits) == (None, 0, None, "all")
    assert (manifest.passes, manifest.verification, manifest.base_fingerprint) == ((), None, None)
    path.write_text(json.dumps({name: value for name, value in known.items() if name != "precision"}))
    with pytest.raises(ExportError, match="precision is missing; export the model again"):
        read_manifest(folder)


# -- manifests of earlier versions -------------------------------------------------------------------------------------

# What the manifest of schema 1 gained, in order: an export made before a step lacks what that step and the later added.
GAINED: tuple[tuple[str, ...], ...] = (
    ("logits", "position_offset"),  # decoders with a cache
    ("quantization", "attention", "passes"),
    ("files",),
    ("image_sizes",),
    ("adapter_inputs",),
    ("weights",),
    ("requires", "quality"),
    ("base",),
    ("rows",),  # decoders with a cache
    ("flavour",),
    ("companions",),  # models with parts beside the graph
    ("programs",),  # graphs over the same weights
    ("limits",),  # sizes that the model's code branches on
)


@pytest.mark.parametrize("step", range(len(GAINED)))
def test_an_export_of_every_earlier_form_opens_and_answers(folder: Path, step: int) -> None:
    path = folder / "gralora_export.json"
    later = {name for names in GAINED[step:] for name in names}
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in later})
    )
    assert not later & set(json.loads(path.read_text()))
    x = torch.randn(3, 8)
    model = trace(nn.Sequential(nn.Linear(8, 200)).eval(), (torch.randn(1, 8),))
    answered = load(folder)(input=x)[0]
    assert answered.shape == (3, 200)
    assert read_manifest(folder).task is None
    report = export_onnx(model, folder, verify=False, overwrite=True)  # and is replaced
    assert set(json.loads(path.read_text())) >= {"files", "weights"}
    assert report.output_dir == folder


def test_the_fields_that_were_gained_are_those_that_an_export_may_lack(exported: Path) -> None:
    """A field added without a value for exports that lack it would close every export made before."""
    gained = {name for names in GAINED for name in names}
    always = {"schema_version", "task", "precision", "adapters_mode", "adapters", "base_fingerprint", "sites"}
    always |= {"inputs", "outputs", "packages", "verification"}  # since the first manifest
    of_features = {name for facts in parts("input facts") for name in facts}
    assert {field.name for field in dataclasses.fields(Manifest)} - {"facts"} | of_features == gained | always


def test_the_error_for_an_older_schema_is_a_command_that_makes_it_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export of today is an older one to the next schema: its command, which replaces it, tells all."""
    path = folder / "gralora_export.json"
    told = {"task": "text-classification", "adapters_mode": "swappable", "quantization": {"kind": "int8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    monkeypatch.setattr(manifest_module, "SCHEMA_VERSION", 2)
    with pytest.raises(ServingError, match="has schema 1, older than 2; export again with gralora-fx export") as error:
        load(folder)
    words = shlex.split(str(error.value).partition("export again with ")[2])
    assert words[:2] == ["gralora-fx", "export"]
    parsed = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert parsed == {
        "--model": "MODEL",
        "--adapter": "ADAPTER",
        "--task": "text-classification",
        "--adapters": "data",
        "--precision": "fp32",
        "--quantize": "int8",
        "--output": str(folder),
    }
    assert words[-1] == "--overwrite"
    known = {option for parameter in get_command(app).commands["export"].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert {*parsed, "--overwrite"} <= known
    model = trace(nn.Sequential(nn.Linear(8, 200)).eval(), (torch.randn(1, 8),))
    export_onnx(model, folder, verify=False, overwrite=True)


@pytest.mark.parametrize(
    ("told", "command"),
    [
        ({"adapters": {}}, "gralora-fx export --model MODEL --precision fp32 --output"),
        ({"adapters": {"default": {}}}, "gralora-fx export --model MODEL --adapter ADAPTER --precision fp32 --output"),
        (
            {"adapters": {}, "base": {"name": "a/base", "revision": None}},
            "gralora-fx export --model a/base --precision fp32 --output",
        ),
        (
            {"adapters_mode": "batched", "base": {"name": "a/base"}},
            "gralora-fx export --model a/base --adapter ADAPTER --adapters data --precision fp32 --output",
        ),
    ],
)
def test_the_command_for_an_older_schema_names_the_base_and_the_adapter(
    tmp_path: Path, told: dict[str, object], command: str
) -> None:
    """Without its adapter, a merged export would be replaced by the bare base."""
    fields = {"schema_version": 0, "precision": "fp32", "adapters_mode": "merged", **told}
    (tmp_path / "gralora_export.json").write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=f"export again with {command}"):
        read_manifest(tmp_path)
