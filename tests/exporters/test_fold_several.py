"""Several adapters folded into one export: it says so, and is verified against the base with all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from fold_cases import assert_same_weights
from peft_oracle import peft_model, perturb_saved_modules
from tiny_models import text_batch, tiny_model
from torch import Tensor, nn
from traces import fresh, relative_error
from typer.testing import CliRunner

from gralora_fx import GraloraModel, TracedModel, merge, trace
from gralora_fx.cli.commands import app
from gralora_fx.errors import ExportError, MergeError
from gralora_fx.exporters import export_onnx, fold_onnx, verify_onnx
from gralora_fx.format.manifest import read_manifest

ADAPTERS: dict[str, dict[str, Any]] = {
    "gralora": {"r": 4, "gralora_k": 2, "target_modules": ["q_proj", "v_proj"]},
    "lora": {"method": "LORA", "r": 4, "target_modules": ["v_proj", "down_proj"]},
    "rslora": {"method": "LORA", "r": 2, "use_rslora": True, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base, its export, and adapters of three methods that PEFT saved."""
    root = tmp_path_factory.mktemp("several")
    tiny_model("llama").save_pretrained(root / "base")
    for name, fields in ADAPTERS.items():
        peft_model(tiny_model("llama"), **fields).save_pretrained(str(root / name))
    export_onnx(fresh("llama")[1], root / "onnx", verify=False)
    return root


def both(root: Path, *names: str) -> GraloraModel:
    traced: TracedModel = fresh("llama")[1]
    model = GraloraModel.from_pretrained(traced, root / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(root / name, name)
    model.set_adapter(list(names))
    return model


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_second_adapter_is_said_and_the_command_verifies_both_in_any_order(root: Path, tmp_path: Path) -> None:
    printed = run("fold", "--onnx", root / "onnx", "--adapter", root / "gralora", "--output", tmp_path / "one")
    assert "now holds" not in printed.stdout
    printed = run("fold", "--onnx", tmp_path / "one", "--adapter", root / "lora", "--output", tmp_path / "two")
    assert "now holds 2 adapters, and a comparison needs each: default, default_2" in printed.stdout
    command = f"gralora-fx verify --onnx {tmp_path / 'two'} --model BASE --adapter {root / 'lora'} --adapter DIR\n"
    assert command in printed.stdout
    assert list(read_manifest(tmp_path / "two").adapters) == ["default", "default_2"]
    export_onnx(both(root, "gralora", "lora"), tmp_path / "fresh", verify=False)
    assert_same_weights(tmp_path / "two", tmp_path / "fresh")
    given = ("verify", "--output", tmp_path / "two", "--model", root / "base", "--task", "text-generation")
    for order in (("gralora", "lora"), ("lora", "gralora")):
        adapters = [part for name in order for part in ("--adapter", root / name)]
        found = run(*given[:5], *adapters)
        assert "passed" in found.stdout, found.stdout
    with pytest.raises(ExportError, match=r"give the directory of each as adapter=\.\.\."):
        run(*given[:5])
    with pytest.raises(ExportError, match=r"'default_2'.*; give its directory as adapter=\.\.\. too"):
        run(*given[:5], "--adapter", root / "gralora")
    with pytest.raises(ExportError, match="is another one"):
        run(*given[:5], "--adapter", root / "gralora", "--adapter", root / "rslora")
    with pytest.raises(ExportError, match="is another one"):
        run(*given[:5], "--adapter", root / "gralora", "--adapter", root / "gralora")
    with pytest.raises(ExportError, match="is one more; give each once"):
        run(*given[:5], *adapters, "--adapter", root / "rslora")


def test_three_adapters_in_python(root: Path, tmp_path: Path) -> None:
    source = root / "onnx"
    for index, name in enumerate(ADAPTERS):
        report = fold_onnx(source, root / name, tmp_path / str(index), adapter_name=name)
        source = tmp_path / str(index)
    assert report.adapters == tuple(ADAPTERS)
    assert "now holds 3 adapters: gralora, lora, rslora" in report.details
    assert verify_onnx(source, both(root, "rslora", "gralora", "lora")).passed
    with pytest.raises(ExportError, match="the given model has"):
        verify_onnx(source, both(root, "gralora", "lora"))


def test_one_that_was_merged_before_the_export(root: Path, tmp_path: Path) -> None:
    export_onnx(merge(both(root, "gralora")), tmp_path / "merged", verify=False)
    report = fold_onnx(tmp_path / "merged", root / "lora", tmp_path / "two")
    assert report.adapters == ("gralora", "default")
    assert verify_onnx(tmp_path / "two", both(root, "gralora", "lora")).passed
    given = ("--adapter", root / "lora", "--adapter", root / "gralora", "--model", root / "base")
    assert "passed" in run("verify", "--output", tmp_path / "two", *given).stdout


def test_an_adapter_is_not_folded_twice(root: Path, tmp_path: Path) -> None:
    fold_onnx(root / "onnx", root / "lora", tmp_path / "one", adapter_name="style")
    with pytest.raises(MergeError, match=r"lora is folded into the export already, as 'style': its update would be"):
        fold_onnx(tmp_path / "one", root / "lora", tmp_path / "two")
    assert not (tmp_path / "two").exists()
    report = fold_onnx(tmp_path / "one", root / "lora", tmp_path / "two", force=True)
    assert report.adapters == ("style", "default")


def test_a_second_one_over_a_quantized_export(root: Path, tmp_path: Path) -> None:
    """Weights that are rounded twice are still roundings of the model's, which verification takes as they are."""
    export_onnx(fresh("llama")[1], tmp_path / "int8", quantize="int8", block_size=16, verify=False)
    options = {"requantize": True, "force": True}
    fold_onnx(tmp_path / "int8", root / "gralora", tmp_path / "one", **options)
    report = fold_onnx(tmp_path / "one", root / "lora", tmp_path / "two", **options)
    assert report.adapters == ("default", "default_2")
    assert verify_onnx(tmp_path / "two", both(root, "gralora", "lora")).passed


def test_heads_do_not_go_together(tmp_path: Path) -> None:
    """A model cannot have both active either; which was folded last would count."""
    export_onnx(fresh("bert")[1], tmp_path / "onnx", verify=False)
    cases: dict[str, dict[str, Any]] = {
        "head": {"modules_to_save": ["classifier"], "target_modules": ["query"]},
        "other": {"modules_to_save": ["classifier"], "target_modules": ["value"]},
        "at": {"target_modules": ["query", "classifier"]},
        "plain": {"target_modules": ["key"]},
    }
    for seed, (name, fields) in enumerate(cases.items()):
        wrapped = peft_model(tiny_model("bert"), seed, method="LORA", r=2, **fields)
        perturb_saved_modules(wrapped)
        wrapped.save_pretrained(str(tmp_path / name))
    fold_onnx(tmp_path / "onnx", tmp_path / "head", tmp_path / "one")
    fold_onnx(tmp_path / "onnx", tmp_path / "at", tmp_path / "adapted")
    for source, name in (("one", "other"), ("one", "at"), ("adapted", "head")):
        with pytest.raises(MergeError, match=r"both change classifier.*, which one of them replaces as a whole"):
            fold_onnx(tmp_path / source, tmp_path / name, tmp_path / "two")
    assert fold_onnx(tmp_path / "one", tmp_path / "plain", tmp_path / "two").adapters == ("default", "default_2")
    model = GraloraModel.from_pretrained(fresh("bert")[1], tmp_path / "head")
    model.load_adapter(tmp_path / "plain", "plain")
    model.set_adapter(["default", "plain"])
    assert verify_onnx(tmp_path / "two", model).passed


class Wrapper(nn.Module):
    """A classifier within another module, so that its names have a prefix."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.m(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def wrapped_export(directory: Path) -> Path:
    """Return an export of a BERT in another module by torch's own exporter, beside a tokenizer and other files."""
    directory.mkdir()
    inputs = text_batch()
    file = directory / "model.onnx"
    torch.onnx.export(
        Wrapper(tiny_model("bert")).eval(), (inputs["input_ids"], inputs["attention_mask"]), str(file),
        input_names=["input_ids", "attention_mask"], output_names=["logits"], dynamo=True, optimize=False,
        verbose=False,
    )  # fmt: skip
    (directory / "config.json").write_text("{}")
    (directory / "notes.txt").write_text("mine")
    return file


def logits_of(file: Path) -> Tensor:
    inputs = {name: value.numpy() for name, value in text_batch().items()}
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(["logits"], inputs)
    return torch.from_numpy(np.asarray(found))


@pytest.mark.parametrize("method", [{"r": 4, "gralora_k": 2}, {"method": "LORA", "r": 4}])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_head_and_biases_within_a_wrapper_are_found_as_layers_are(
    method: dict[str, Any], bias: str, tmp_path: Path
) -> None:
    file = wrapped_export(tmp_path / "foreign")
    wrapped = peft_model(
        tiny_model("bert"), target_modules=["query", "dense"], task_type="SEQ_CLS", bias=bias, **method
    )
    perturb_saved_modules(wrapped)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.1)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    report = fold_onnx(file, tmp_path / "adapter", tmp_path / "out")
    assert {"classifier.weight", "classifier.bias"} <= set(report.replaced)
    inputs = text_batch()
    with torch.no_grad():
        expected = wrapped(**inputs).logits
    assert relative_error(logits_of(tmp_path / "out" / "model.onnx"), expected) < 1e-5
    assert relative_error(logits_of(file), expected) > 1e-3


def test_a_file_stands_for_its_export(root: Path, tmp_path: Path) -> None:
    """A file of an export of ours stands for the whole directory, another file for itself alone."""
    report = fold_onnx(root / "onnx" / "model.onnx", root / "lora", tmp_path / "ours")
    assert "gralora_export.json" in report.files
    file = wrapped_export(tmp_path / "foreign")
    (tmp_path / "foreign" / "other.onnx").write_bytes(b"not a model")
    peft_model(tiny_model("bert"), method="LORA", r=2, target_modules=["query"]).save_pretrained(str(tmp_path / "a"))
    given = ("fold", "--onnx", file, "--adapter", tmp_path / "a")
    run(*given, "--output", tmp_path / "foreign" / "folded")  # within the file's directory, which is not an export
    written = {path.name for path in (tmp_path / "foreign" / "folded").iterdir()}
    assert written - {"model.onnx.data"} == {"model.onnx", "config.json"}
    with pytest.raises(ExportError, match=r"foreign is not empty and holds no gralora_export\.json"):
        run(*given, "--output", tmp_path / "foreign")
    with pytest.raises(ExportError, match=r"notes\.txt is not an ONNX file \(\*\.onnx\); give one, or the directory"):
        run("fold", "--onnx", tmp_path / "foreign" / "notes.txt", *given[3:], "--output", tmp_path / "out")
    with pytest.raises(ExportError, match=r"nowhere\.onnx, which does not exist; give the directory"):
        run("fold", "--onnx", tmp_path / "nowhere.onnx", *given[3:], "--output", tmp_path / "out")


def test_verify_takes_one_adapter_of_an_export_with_data(root: Path, tmp_path: Path) -> None:
    export_onnx(both(root, "gralora"), tmp_path / "data", adapters="data", verify=False)
    given = ("--adapter", root / "gralora", "--adapter", root / "lora", "--model", root / "base")
    with pytest.raises(ExportError, match="takes adapters as data, and is verified with one at a time"):
        run("verify", "--output", tmp_path / "data", *given)


def test_peft_and_trace_agree_on_the_wrapper(tmp_path: Path) -> None:
    """An export of ours of a wrapped model names its layers with the prefix, as PEFT does of that module."""
    module = Wrapper(tiny_model("bert"))
    inputs = text_batch()
    export_onnx(trace(module.eval(), (inputs["input_ids"], inputs["attention_mask"])), tmp_path / "onnx", verify=False)
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    wrapped = peft.get_peft_model(Wrapper(tiny_model("bert")).eval(), config)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "out")
    entries = json.loads((tmp_path / "out" / "gralora_export.json").read_text())["adapters"]
    assert entries["default"]["base"]["outcome"] == "unknown"
