"""Bases of GPTQ, AWQ, compressed-tensors and FP8, read as the floats that their layers multiply by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_oracle import peft_model
from quantized_checkpoints import CASES, SIZES, Parts, checkpoint, compressed, describe, gptq
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from typer.testing import CliRunner

from gralora_fx import GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.cli import app
from gralora_fx.errors import CheckpointError, ConfigError, TraceError
from gralora_fx.exporters import export_onnx, merge_checkpoint
from gralora_fx.loading import load_model, load_streamed
from gralora_fx.serving import load


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_read_as_the_floats_that_its_layers_multiply_by(name: str, tmp_path: Path) -> None:
    expected = checkpoint(tmp_path, name).state_dict()
    actual = load_model(tmp_path).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    streamed = load_streamed(tmp_path)
    assert streamed.config.base_quantization["kind"] == CASES[name][1]["quant_method"]


def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    checkpoint(tmp_path, "fp8", intermediate_size=128)  # whole blocks: of others they take the rows as even
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    ).state_dict()
    ours = load_model(tmp_path).state_dict()
    assert all(torch.allclose(ours[key], value, atol=1e-7) for key, value in theirs.items())


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        {"num_bits": 8, "strategy": "tensor", "symmetric": False},
        {"num_bits": 4, "strategy": "tensor", "symmetric": False},
        {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_compressed_tensors_are_what_its_own_library_makes_of_them(weights: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(tmp_path, weights)
    actual = load_model(tmp_path).state_dict()
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key].float()) for key, value in actual.items())


@pytest.mark.parametrize("method", ["GRALORA", "LORA", "DORA"])
def test_an_adapter_is_merged_exported_and_answers_as_over_the_floats(method: str, tmp_path: Path) -> None:
    floats = checkpoint(tmp_path / "base", "gptq in an order of its own")
    theirs = peft_model(floats, method=method, r=4, target_modules=["q_proj", "down_proj"])
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = theirs(ids).logits
    traced = trace(load_model(tmp_path / "base"), task="text-generation-with-past")
    model = GraloraModel.from_pretrained(traced, tmp_path / "adapter")
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    if method == "GRALORA":
        report = export_onnx(model, tmp_path / "export", quantize="float", verify="quick")
        manifest = json.loads((tmp_path / "export" / "gralora_export.json").read_text())
        assert manifest["base"]["quantization"] == {"kind": "gptq", "layout": "gptq", "bits": 4}
        assert report.verification.passed
        assert torch.allclose(load(tmp_path / "export")(input_ids=ids).logits[:, -1:], expected[:, -1:], atol=1e-5)
    result = CliRunner().invoke(
        app,
        ["merge", f"--model={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}", f"--output={tmp_path / 'out'}"],
    )
    assert result.exit_code == 0, result.output
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, expected, atol=2e-3 * float(expected.abs().max()))  # in float16


def test_a_merge_of_several_files_has_all_weights_in_its_index_and_their_dtype_in_its_configuration(
    tmp_path: Path,
) -> None:
    """Integers and scales are in files of their own, of which the last holds no tensor of the model."""
    base = tmp_path / "base"
    floats = checkpoint(base, "gptq 4")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    files = {"qweight": "model-1.safetensors", "weight": "model-2.safetensors"}
    places = {key: files.get(key.rpartition(".")[2], "model-3.safetensors") for key in tensors}
    for name in set(places.values()):
        save_file({key: tensors[key] for key in tensors if places[key] == name}, base / name, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    theirs = peft_model(floats, method="LORA", r=4, target_modules=["q_proj"])
    theirs.save_pretrained(str(tmp_path / "adapter"))
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.float16
    expected = theirs.merge_and_unload().state_dict()
    assert index.keys() == expected.keys()
    assert all(
        torch.allclose(value.float(), expected[key], rtol=1e-3, atol=1e-6) for key, value in merged.state_dict().items()
    )


def test_an_adapter_over_the_float_base_is_told_to_take_the_checkpoint_alone(tmp_path: Path) -> None:
    floats = checkpoint(tmp_path / "base", "gptq 4")
    floats.save_pretrained(tmp_path / "floats")
    adapted = rewrite(trace(load_model(tmp_path / "base")), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="GPTQ of 4 bits, and the weights here are .*; take its quantized checkpoint"):
        GraloraModel.from_pretrained(trace(load_model(tmp_path / "floats")), tmp_path / "adapter")


@pytest.mark.parametrize("block", [[64], [64, 0], "64"])
def test_a_block_that_is_none_is_named(block: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path, "fp8")
    describe(tmp_path, {"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(TraceError, match=r"weight_block_size of FP8 is .*, not the rows and columns of a block"):
        load_model(tmp_path)


def test_what_is_not_done_with_it_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "awq")
    with pytest.raises(
        ConfigError, match=r"weights of AWQ of 4 bits are read as floats, and not held packed; load the base unp"
    ):
        load_model(tmp_path, packed=True)
    with pytest.raises(ConfigError, match="is quantized already, and its own values are taken"):
        load_model(tmp_path, base_quantization="nf4")
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "floats")
    with pytest.raises(ConfigError, match="is read from its checkpoint, and floats cannot be rounded to it here"):
        load_model(tmp_path / "floats", base_quantization=CASES["awq"][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("qzeros"), "qzeros is missing"),
        (lambda parts: parts.update(scales=parts["scales"][:1]), "qzeros is I32 of shape"),
        (lambda parts: parts.update(scales=parts["scales"] / 0), "scales is not finite"),
        (lambda parts: parts.update(qweight=parts["qweight"].float()), "qweight is F32 of shape"),
        (lambda parts: parts.update(g_idx=parts["g_idx"][:5]), r"g_idx is I32 of shape \[5\], and has to be I32 of sh"),
        (lambda parts: parts.update(g_idx=parts["g_idx"] + 1), "g_idx names groups 1 to"),
        (lambda parts: parts.update(scales=parts["scales"][0, 0]), r"scales has shape \[\], not that of a matrix"),
        (lambda parts: parts.update(qweight=parts["qweight"][:0], g_idx=parts["g_idx"][:0]), "qweight has shape"),
        (lambda parts: [parts.pop("g_idx"), parts.update(scales=parts["scales"][:0])], "scales has shape"),
        (lambda parts: parts.update(qzeros=parts["qzeros"].repeat(1, 8)), "qzeros is I32 of shape"),  # one in a word
        (lambda parts: parts.update(qzeros=parts["qzeros"].half()), "qzeros is F16 of shape"),
    ],
)
def test_damaged_checkpoints_are_named(change: Callable[[Parts], Any], message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, "gptq 4")
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj."
    parts = {key.removeprefix(layer): tensors.pop(key) for key in [*tensors] if key.startswith(layer)}
    change(parts)
    save_file(
        tensors | {layer + key: value.contiguous() for key, value in parts.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=rf"up_proj.weight: {message}"):
        load_model(tmp_path)


def test_groups_of_another_size_than_the_configuration_says_are_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gptq 4")
    describe(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 64})
    with pytest.raises(CheckpointError, match=r"its 96 inputs have 3 groups, and by group_size 64 in con"):
        load_model(tmp_path)
    describe(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 0})
    with pytest.raises(TraceError, match="group_size of GPTQ is 0, not a number of inputs, or -1 for all"):
        load_model(tmp_path)


def test_layers_with_bits_and_groups_of_their_own_are_read_by_their_tensors(tmp_path: Path) -> None:
    """GPTQModel's rules for layers, by expressions of their paths."""
    expected = checkpoint(tmp_path, "gptq 4").state_dict()
    path = "model.layers.0.mlp.up_proj"
    own, weight = gptq(8, size=16)(96, 64)
    tensors = load_file(tmp_path / "model.safetensors") | {f"{path}.{key}": value for key, value in own.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    rules = {"+:.*up_proj": {"bits": 8, "group_size": 16}}
    describe(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": rules})
    actual = load_model(tmp_path).state_dict()
    expected[f"{path}.weight"] = weight.float()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize("where", ["fp8", "compressed"])
def test_fp8_that_is_no_number_is_named(where: str, tmp_path: Path) -> None:
    if where == "fp8":
        checkpoint(tmp_path, "fp8")
    else:
        compressed(tmp_path, {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True})
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[3, 4:6] = 0x7F
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"2 of the values of {name} are NaN; copy the model"):
        load_model(tmp_path)


def test_an_order_of_minus_one_stands_for_none(tmp_path: Path) -> None:
    """Compressed-tensors' own sign of groups one after the other."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
    expected = compressed(tmp_path, weights).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    actual = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, expected[key].float()) for key, value in actual.items())


def in_two_files(folder: Path) -> dict[str, str]:
    """Split a checkpoint into two files with an index; returns the file of each tensor."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"model-{1 + ('mlp' in key)}.safetensors" for key in tensors}
    for name in set(places.values()):
        save_file({key: tensors[key] for key in tensors if places[key] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_files_that_are_missing_or_cut_and_names_that_stand_twice_are_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gptq 4")
    places = in_two_files(tmp_path)
    index, last = tmp_path / "model.safetensors.index.json", tmp_path / "model-2.safetensors"
    key = next(key for key in places if "mlp" in key)
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{"{key}": "model-1.safetensors", '))
    with pytest.raises(CheckpointError, match=f"names {key} twice; copy the model again"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model-2.safetensors"):
        load_model(tmp_path)
    last.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-2.safetensors, which model.safetensors.index.json names"):
        load_model(tmp_path)
