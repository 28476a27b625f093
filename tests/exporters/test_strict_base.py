"""An adapter of another base whose directory has the same last name: readers warn, refuse strictly, and record it."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft_oracle import peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, merge, rewrite, trace
from gralora_fx.base.sources.same_base import BaseSource
from gralora_fx.cli.commands import app
from gralora_fx.core.loading import bases as loading
from gralora_fx.core.loading.bases import load_base, load_traced, trace_base
from gralora_fx.errors import CheckpointError, ExportError
from gralora_fx.exporters import export_adapter, export_onnx, fold_onnx, merge_checkpoint, verify_onnx
from gralora_fx.exporters.artifact.staging import check_base_replaced
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.sessions.adapter_file import read_record

METHODS: dict[str, dict[str, Any]] = {"gralora": {"r": 4, "gralora_k": 2}, "lora": {"method": "LORA", "r": 4}}
TARGETS = ["q_proj", "v_proj"]


@functools.cache
def _traced(base: Path) -> TracedModel:
    return trace(AutoModelForCausalLM.from_pretrained(base).eval(), task="text-generation")


def traced(base: Path) -> TracedModel:
    """Return a trace of a base that knows where it comes from, for a test to change."""
    return copy.deepcopy(_traced(base))


class Bases:
    """Two bases of one shape and other architectures, both called `base`, their exports, and adapters of the first."""

    def __init__(self, root: Path) -> None:
        self.root, self.own, self.other = root, root / "qwen3" / "base", root / "gemma3" / "base"
        for base in (self.own, self.other):
            tiny_model(base.parent.name).save_pretrained(base)
            model = rewrite(traced(base), GraloraConfig(r=2, target_modules=TARGETS), adapter_name="own")
            export_onnx(model.traced, base.parent / "merged", verify=False)
            export_onnx(model, base.parent / "data", adapters="data", verify=False)
        for name, fields in METHODS.items():
            model = AutoModelForCausalLM.from_pretrained(self.own)
            peft_model(model, target_modules=TARGETS, **fields).save_pretrained(str(root / name))

    def readers(self, base: Path, adapter: Path, out: Path) -> dict[str, Callable[..., Any]]:
        """Whatever uses an adapter with a base or its export; each takes `strict_base`."""
        out.mkdir()
        exports = base.parent
        model = rewrite(traced(base), GraloraConfig(r=2, target_modules=["k_proj"]))
        return {
            "from_pretrained": lambda **o: GraloraModel.from_pretrained(model.traced, adapter, **o),
            "load_adapter": lambda **o: model.load_adapter(adapter, "new", **o),
            "load_traced": lambda **o: load_traced(str(base), str(adapter), "text-generation", **o),
            "merge": lambda **o: merge_checkpoint(base, adapter, out / "model", overwrite=True, **o),
            "fold": lambda **o: fold_onnx(exports / "merged", adapter, out / "folded", overwrite=True, **o),
            "export_adapter": lambda **o: export_adapter(adapter, exports / "data", "new", overwrite=True, **o),
        }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_base_is_named_and_refused_strictly(bases: Bases, method: str, tmp_path: Path) -> None:
    adapter = bases.root / method
    text = (
        rf"{method} was made for {bases.own}, and is used with {bases.other}, another base: model_type qwen3 and gemma3"
    )
    for name, read in bases.readers(bases.other, adapter, tmp_path / "out").items():
        before = sorted((tmp_path / "out").iterdir())
        with pytest.raises(
            CheckpointError, match=rf"{text}.*; give the base that it was made for, or leave strict_base"
        ):
            read(strict_base=True)
        assert sorted((tmp_path / "out").iterdir()) == before
        with pytest.warns(UserWarning, match=text) as caught:
            read()
        assert len([w for w in caught if "was made for" in str(w.message)]) == 1, name


@pytest.mark.parametrize("method", METHODS)
def test_its_own_base_is_used_without_a_word(bases: Bases, method: str, tmp_path: Path) -> None:
    moved = tmp_path / "copy" / "elsewhere"
    shutil.copytree(bases.own, moved)
    for base in (bases.own, moved):
        if base == moved:
            readers = {"merge": lambda **o: merge_checkpoint(moved, bases.root / method, tmp_path / "m", **o)}
        else:
            readers = bases.readers(bases.own, bases.root / method, tmp_path / "out")
        for read in readers.values():
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*was made for.*")
                read(strict_base=True)


def test_records_say_what_was_compared(bases: Bases, tmp_path: Path) -> None:
    expected = {"outcome": "different", "made_for": str(bases.own), "used_with": str(bases.other)}
    same = {"outcome": "same", "made_for": str(bases.own), "used_with": str(bases.own), "compared": ["name"]}
    for base, fields in ((bases.other, expected), (bases.own, same)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = merge_checkpoint(base, bases.root / "lora", tmp_path / base.parent.name / "model")
            folded = fold_onnx(base.parent / "merged", bases.root / "lora", tmp_path / base.parent.name / "folded")
            record = read_record(export_adapter(bases.root / "lora", base.parent / "data", "noted"))
            model = GraloraModel.from_pretrained(traced(base), bases.root / "lora", adapter_name="a")
            export_onnx(merge(model), tmp_path / base.parent.name / "onnx", verify=False)
            export_onnx(model, tmp_path / base.parent.name / "data", adapters="inputs", verify=False)
        found = [
            report.base.to_dict() if report.base else {},
            folded.base.to_dict() if folded.base else {},
            record.base,
        ]
        found += [read_manifest(folded.output_dir).adapters["default"].base]
        found += [read_manifest(tmp_path / base.parent.name / "onnx").adapters["a"].base]
        found += [read_record(tmp_path / base.parent.name / "data" / "adapters" / "a.onnx_adapter").base]
        for entry in found:
            assert entry is not None
            assert {name: entry[name] for name in fields} == fields
            assert "fingerprint" not in entry["compared"]
    assert read_manifest(bases.own.parent / "merged").base.name == str(bases.own)  # type: ignore[union-attr]


def test_an_export_whose_base_is_gone_is_compared_by_its_configuration(bases: Bases, tmp_path: Path) -> None:
    shutil.copytree(bases.other.parent / "data", tmp_path / "export")
    manifest = json.loads((tmp_path / "export" / "gralora_export.json").read_text())
    manifest["base"] = {"name": "/gone/base", "revision": None}
    (tmp_path / "export" / "gralora_export.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"is used with /gone/base, another base: model_type qwen3 and gemma3_text"):
        export_adapter(bases.root / "lora", tmp_path / "export", "x")
    del manifest["base"]  # as an older export's
    (tmp_path / "export" / "gralora_export.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"is used with a model without a name, another base: model_type qwen3"):
        export_adapter(bases.root / "lora", tmp_path / "export", "y")


def test_strictly_before_anything_is_loaded(bases: Bases) -> None:
    with pytest.raises(CheckpointError, match="another base: model_type"):
        load_base(str(bases.other), str(bases.root / "lora"), None, strict_base=True)


def test_commands_have_the_option(bases: Bases, tmp_path: Path) -> None:
    model, export = ("--model", bases.other), bases.other.parent
    adapter, output = ("--adapter", bases.root / "lora"), ("--output", tmp_path / "out")
    commands: tuple[tuple[object, ...], ...] = (
        ("export", *model, *adapter, *output),
        ("inspect", *model, *adapter),
        ("merge", *model, *adapter, *output),
        ("fold", "--onnx", export / "merged", *adapter, *output),
        ("export-adapter", "--onnx", export / "data", *adapter, "--name", "strict"),
        ("verify", *model, *adapter, "--output", export / "data"),
    )
    for command in commands:
        result = CliRunner().invoke(app, [*map(str, command), "--strict-base"])
        assert isinstance(result.exception, CheckpointError), (command, result.output)
        assert "another base: model_type qwen3 and gemma3_text" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_is_of_another_base_where_its_own_configuration_says_so(bases: Bases, tmp_path: Path) -> None:
    """Its base may be gone, or another model by now; a name or a commit alone says nothing."""
    export = tmp_path / "export"
    shutil.copytree(bases.own.parent / "merged", export)
    text = (export / "gralora_export.json").read_text()
    for entry in ({"name": "/gone/base", "revision": None}, {"name": str(bases.other), "revision": None}):
        (export / "gralora_export.json").write_text(json.dumps(json.loads(text) | {"base": entry}))
        with pytest.raises(ExportError, match=r"holds an export of another base.*: model_type qwen3 and gemma3_text"):
            check_base_replaced(export, BaseSource(str(bases.other)))
    for entry in ({"name": "gpt2", "revision": None}, {"name": "org/base", "revision": "a" * 40}):
        (export / "gralora_export.json").write_text(json.dumps(json.loads(text) | {"base": entry}))
        for used in (BaseSource("openai-community/gpt2"), BaseSource("org/base", "b" * 40), BaseSource(str(bases.own))):
            check_base_replaced(export, used)


def test_adapters_that_a_new_export_does_not_bring_are_not_removed_in_silence(bases: Bases, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(bases.own.parent / "data", export)
    export_adapter(bases.root / "lora", export, "two")
    model = rewrite(traced(bases.own), GraloraConfig(r=2, target_modules=TARGETS), adapter_name="own")
    other = rewrite(traced(bases.own), GraloraConfig(r=2, target_modules=TARGETS), adapter_name="other")
    with pytest.raises(ExportError, match=r"'other' is not in .*; give adapter_name=.*'two' if"):
        verify_onnx(export, other)
    with pytest.warns(UserWarning, match=r"holds .*two, which this export removes; add them again"):
        export_onnx(model, export, adapters="data", verify=False)
    assert [path.name for path in (export / "adapters").glob("*.onnx_adapter")] == ["own.onnx_adapter"]
    export_onnx(model, export, adapters="data", verify=False)  # brings all that is there
    with pytest.warns(UserWarning, match="holds the adapter own, which this export removes"):
        export_onnx(model, export, verify=False, overwrite=True)


def test_strictly_a_base_that_is_downloaded_only_then_is_checked_when_it_is_loaded(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is only then downloaded, or already in the hub's cache, is checked when it is loaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(loading, "check_model_files", lambda *_, **__: None)
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("a" * 40)
    load = loading.load_with_report

    def downloaded(source: Path) -> Callable[..., Any]:
        def load_with_report(name: str, *args: Any, **options: Any) -> Any:
            shutil.copytree(source, snapshot)
            (snapshot.parents[1] / "refs").mkdir()
            (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
            return load(snapshot, *args, **options)

        return load_with_report

    adapter = str(bases.root / "lora")
    for source, is_same in ((bases.own, True), (bases.other, False)):
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        monkeypatch.setattr(loading, "load_with_report", downloaded(source))
        base = load_base("org/model", adapter, "text-generation", strict_base=True)
        if is_same:
            assert isinstance(trace_base(base), GraloraModel)
            continue
        with pytest.raises(CheckpointError, match=r"^.*lora was made for .*, another base: model_type qwen3"):
            trace_base(base)
    with pytest.raises(CheckpointError, match="another base: model_type"):  # it is there now
        load_base("org/model", adapter, "text-generation", strict_base=True)


def test_strictly_every_adapter_is_checked_before_anything_is_loaded(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    shutil.copytree(bases.root / "lora", own)
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(bases.other)}))
    monkeypatch.setattr(loading, "load_with_report", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(CheckpointError, match=r"gralora was made for .*, another base"):
        load_base(str(bases.other), str(own), None, strict_base=True, others=[str(bases.root / "gralora")])
