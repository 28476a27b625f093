"""Commands on bases of four bits: merged into files, folded into exports, converted, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from four_bit_bases import float_base, in_four_bits, inputs, trained
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from gralora_fx.cli.program import app
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.errors import CheckpointError, ConfigError
from gralora_fx.exporters import export_adapter, export_onnx, fold_onnx, merge_checkpoint, to_lora
from gralora_fx.features.nf4.four_bits import FourBits
from gralora_fx.serving import load

pytest.importorskip("bitsandbytes")
DOUBLE = FourBits(double=True)


class Case:
    """A float base, the same in four bits, and an adapter that PEFT trained on the latter."""

    def __init__(self, folder: Path, name: str) -> None:
        self.base = float_base(folder / "base", name)
        model = in_four_bits(self.base, DOUBLE)
        self.packed = folder / "packed"
        model.save_pretrained(self.packed, max_shard_size="200KB")
        self.inputs = inputs(model)
        self.adapter = folder / "adapter"
        theirs = trained(model, "LoRA", self.adapter)
        with torch.no_grad():
            self.expected = theirs(**self.inputs).logits
        self.recorded = folder / "recorded"
        shutil.copytree(self.adapter, self.recorded)
        config = self.recorded / "adapter_config.json"
        fields = json.loads(config.read_text()) | {"base_quantization": DOUBLE.to_dict()}
        config.write_text(json.dumps(fields))

    def far(self, logits: Any) -> float:
        expected = self.expected.numpy()
        return float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("gpt2"), "GPT2LMHeadModel")


@pytest.fixture(scope="module")
def exported(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export of the base in four bits, that takes adapters as data."""
    output = tmp_path_factory.mktemp("exported") / "data"
    model = load_traced(str(llama.packed), str(llama.adapter), None)
    export_onnx(model, output, adapters="data", verify=False)
    return output


@pytest.mark.parametrize("of", ["packed", "base"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merge_has_pefts_outputs(name: str, of: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    case: Case = request.getfixturevalue(name)
    asked = "nf4-double" if of == "base" else None
    report = merge_checkpoint(getattr(case, of), case.adapter, tmp_path / "merged", base_quantization=asked)
    assert not any("quant" in key or "absmax" in key for key in load_all(tmp_path / "merged"))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config")
    assert any("quantization_config is left out" in change for change in report.config_changes) == (of == "packed")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert case.far(merged.eval()(**case.inputs).logits) < 1e-5


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def test_a_merge_into_floats_of_an_adapter_of_four_bits_warns(llama: Case, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="its base was in nf4-double-64, and the weights here are float: they"):
        merge_checkpoint(llama.base, llama.recorded, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="take base_quantization='nf4-double-64'"):
        merge_checkpoint(llama.base, llama.recorded, tmp_path / "strict", strict_base=True)
    with pytest.raises(ConfigError, match="quantized already"):
        merge_checkpoint(llama.packed, llama.adapter, tmp_path / "twice", base_quantization="nf4")
    assert not (tmp_path / "strict").exists()
    assert not (tmp_path / "twice").exists()


def test_an_adapter_as_data_of_its_export(llama: Case, exported: Path) -> None:
    export_adapter(llama.recorded, exported, "again", strict_base=True)
    logits = load(exported)(input_ids=llama.inputs["input_ids"].numpy(), adapter="again")["logits"]
    assert llama.far(logits) < 1e-4


def test_an_adapter_of_four_bits_as_data_of_floats_warns(llama: Case, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="they differ by"):  # which loading it tells, too
        model = load_traced(str(llama.base), str(llama.recorded), None)
    export_onnx(model, tmp_path / "floats", adapters="data", verify=False)
    with pytest.warns(UserWarning, match="they differ by"):
        export_adapter(llama.recorded, tmp_path / "floats", "again")
    record = json.loads((tmp_path / "floats" / "adapters" / "again.json").read_text())
    assert record["base"]["outcome"] == "different"
    assert 0.05 < record["base"]["change"] < 0.15


@pytest.mark.parametrize("given", ["base", "packed"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_fold_into_its_export(llama: Case, tmp_path: Path, quantize: str | None, given: str) -> None:
    base = load_traced(str(llama.base), None, None, base_quantization="nf4-double")
    export_onnx(base, tmp_path / "base", quantize=quantize, verify=False)
    options = {"requantize": True} if quantize else {}
    fold_onnx(tmp_path / "base", llama.recorded, tmp_path / "folded", base=getattr(llama, given), **options)
    logits = load(tmp_path / "folded")(input_ids=llama.inputs["input_ids"].numpy())["logits"]
    assert llama.far(logits) < (5e-2 if quantize else 1e-4)
    whole = load_traced(str(llama.base), str(llama.adapter), None, base_quantization="nf4-double")
    export_onnx(whole, tmp_path / "whole", quantize=quantize, verify=False)
    direct = load(tmp_path / "whole")(input_ids=llama.inputs["input_ids"].numpy())["logits"]
    assert np.abs(direct - logits).max() < 1e-5 * np.abs(direct).max(), "the same blocks as an export with it"


def test_its_plain_lora_form_keeps_the_record(llama: Case, tmp_path: Path) -> None:
    to_lora(llama.recorded, tmp_path / "lora", rank=2)
    fields = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert fields["base_quantization"] == DOUBLE.to_dict()


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line(llama: Case, tmp_path: Path) -> None:
    shown = run("inspect", "--model", llama.base, "--adapter", llama.adapter, "--base-quantization", "nf4-double")
    assert shown.exit_code == 0
    words = ["--model", llama.base, "--adapter", llama.adapter, "--base-quantization", "nf4-double"]
    made = run("export", *words, "--output", tmp_path / "export", "--no-tokenizer")
    assert made.exit_code == 0, made.output
    again = run("export", *words, "--output", tmp_path / "export", "--no-tokenizer", "--no-verify")
    assert again.exit_code == 0, "the same base, so it is replaced"
    floats = run("export", "--model", llama.base, "--output", tmp_path / "export", "--no-tokenizer")
    assert "its base was in nf4-double-64" in str(floats.exception)
    verified = run("verify", "--onnx", tmp_path / "export", "--model", llama.base, "--adapter", llama.adapter)
    assert verified.exit_code == 0, "the manifest says how the base is rounded"
    merged = run("merge", *words, "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output


@pytest.mark.parametrize("command", ["inspect", "export", "merge"])
def test_bad_words_and_bases_are_refused_before_anything_is_written(llama: Case, tmp_path: Path, command: str) -> None:
    output = [] if command == "inspect" else ["--output", tmp_path / "out"]
    foreign = tmp_path / "hqq"
    foreign.mkdir()
    fields = json.loads((llama.base / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "hqq"}}))
    for model, words, message in (
        (llama.base, ["--base-quantization", "nf5"], "base_quantization='nf5' is not available; take int8; or nf4"),
        (llama.packed, ["--base-quantization", "nf4"], "is quantized already"),
        (foreign, [], "is quantized by HQQ, which is not read"),
    ):
        result = run(command, "--model", model, "--adapter", llama.adapter, *words, *output)
        assert result.exit_code != 0
        assert message in str(result.exception), result.output
    assert not (tmp_path / "out").exists()
