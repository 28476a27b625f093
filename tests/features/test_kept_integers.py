"""Exports that keep the integers of quantized checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from four_bit_bases import float_base, in_eight_bits
from onnx import numpy_helper
from peft_oracle import peft_model
from quantized_checkpoints import AWQ_ORDER, CASES, SIZES, Parts, checkpoint, codes_of, compressed, describe, gptq
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor, nn
from typer.testing import CliRunner

from gralora_fx import GraloraModel, trace
from gralora_fx.cli import app
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, fold_onnx
from gralora_fx.format.manifest import read_manifest
from gralora_fx.loading import load_model, load_streamed
from gralora_fx.serving import load

IDS = torch.tensor([[5, 6, 7, 8]])
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.0.{layer}" for layer in LAYERS]
CASES["gptq of 128 in an order of its own"] = (
    gptq(4, acts=True, size=128, symmetric=True),
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
)
CASES["gptq of whole rows"] = (gptq(4, size=-1), {"quant_method": "gptq", "bits": 4, "group_size": -1})


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1:]


def distance(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


def stored_codes(parts: Parts, method: str, bits: int) -> tuple[Tensor, Tensor]:
    """Return the integers `[out, in]` and the zero points `[out, groups]` of a checkpoint's layer, word by word."""
    if method == "awq":
        place = torch.tensor(AWQ_ORDER).argsort()
        codes, zeros = (
            codes_of(parts[name], 4, parts["scales"].shape[1]).reshape(len(parts[name]), -1, 8)[..., place].flatten(1)
            for name in ("qweight", "qzeros")
        )
        return codes.T, zeros.T
    outputs = parts["scales"].shape[1]
    codes = codes_of(parts["qweight"].T, bits, parts["qweight"].shape[0] * 32 // bits)
    return codes, codes_of(parts["qzeros"], bits, outputs).T + 1


class Exported:
    """The initializers of an export, and where each layer's weight lies."""

    def __init__(self, folder: Path) -> None:
        graph = onnx.load(folder / "model.onnx").graph
        self.values = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
        self.products = {node.input[1]: node for node in graph.node if node.op_type == "MatMulNBits"}
        self.orders = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "Gather"}
        self.casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
        self.manifest = read_manifest(folder)

    def layer(self, path: str) -> tuple[dict[str, int], Tensor, Tensor, Tensor]:
        """Return attributes, integers `[out, in]`, and the zero points and scales of the groups of each input."""
        assert self.manifest.weights is not None
        entry, *rest = self.manifest.weights[path]
        assert all(other.initializer == entry.initializer for other in rest)  # of the graph of rows
        node = self.products[entry.initializer]
        flags = {attribute.name: attribute.i for attribute in node.attribute}
        count, bits, size = -(-flags["K"] // flags["block_size"]), flags["bits"], flags["block_size"]
        rows = slice(entry.start, entry.stop)
        unpacked = [self._integers(self.values[entry.initializer][rows].reshape(entry.stop - entry.start, -1), bits)]
        zeros = np.full((len(unpacked[0]), count), 1 << (bits - 1))
        if len(node.input) > 3:
            zeros = self._integers(self.values[node.input[3]][rows], bits)[:, :count]
        scales = self.values[self.casts.get(node.input[2], node.input[2])][rows].astype(np.float32)
        parts = [array.repeat(size, 1)[:, : flags["K"]] for array in (zeros, scales)]
        arrays = [unpacked[0][:, : flags["K"]], *parts]
        if (order := self.orders.get(node.input[0])) is not None:
            arrays = [array[:, np.argsort(self.values[order])] for array in arrays]
        codes, zero_points, steps = map(torch.from_numpy, arrays)
        return flags, codes.long(), zero_points.long(), steps

    def product(self, path: str) -> onnx.NodeProto:
        """Return the node that multiplies by a layer's weight."""
        assert self.manifest.weights is not None
        return self.products[self.manifest.weights[path][0].initializer]

    @staticmethod
    def _integers(stored: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
        if bits == 4:
            stored = np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)
        return stored.astype(np.int64)


# by the name of a checkpoint its sizes, and the bits and the blocks of the export
KEPT: dict[str, tuple[dict[str, Any], int, int]] = {
    "gptq 3": ({}, 4, 32),
    "gptq 8": ({}, 8, 32),
    "gptq of 128 in an order of its own": (WIDE, 4, 128),
    "gptq of whole rows": ({}, 4, 32),
    "awq": ({}, 4, 32),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_integers_of_an_export_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    sizes, bits, block_size = KEPT[name]
    floats = checkpoint(tmp_path / "base", name, **sizes)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    traced = trace(load_model(tmp_path / "base"), task="text-generation-with-past")
    report = export_onnx(traced, tmp_path / "export", accuracy_level=1)
    assert report.verification.passed
    assert report.quantization.kind == "kept"
    assert report.quantization.bits == bits
    exported, config, unrounded = Exported(tmp_path / "export"), CASES[name][1], dict[str, Tensor]()
    for path in PATHS:
        parts = {
            key: tensors[f"{path}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")[: 3 + (name != "awq")]
        }
        codes, zeros = stored_codes(parts, config["quant_method"], config["bits"])
        groups = parts.get("g_idx", torch.arange(codes.shape[1]) // 32).long()
        flags, kept, zero_points, scales = exported.layer(path)
        assert (flags["bits"], flags["block_size"]) == (bits, block_size)
        assert torch.equal(kept, codes)
        assert torch.equal(zero_points, zeros[:, groups])
        assert torch.equal(scales, parts["scales"].T[:, groups].float())
        unrounded[f"{path}.weight"] = (codes - zeros[:, groups]) * parts["scales"].T[:, groups].float()
    actual = logits(load(tmp_path / "export"))
    assert distance(logits(floats), actual) < 1e-3
    floats.load_state_dict(floats.state_dict() | unrounded)  # in float16 the checkpoint's floats are rounded once more
    assert distance(logits(floats), actual) < 1e-5


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, 32),
        ({"num_bits": 8, "strategy": "channel", "symmetric": True}, 64),
        ({"num_bits": 8, "strategy": "tensor", "symmetric": False}, 64),
    ],
    ids=lambda value: value["strategy"] if isinstance(value, dict) else "",
)
def test_those_of_compressed_tensors_are_kept(weights: dict[str, Any], size: int, tmp_path: Path) -> None:
    floats = compressed(tmp_path / "base", weights).float()
    bits, is_symmetric = weights["num_bits"], weights["symmetric"]
    file = tmp_path / "base" / "model.safetensors"
    tensors, codes = load_file(file), dict[str, Tensor]()
    for path in PATHS:
        layer = floats.get_submodule(path)
        codes[path] = codes_of(tensors[f"{path}.weight_packed"], bits, layer.in_features)
        if weights["strategy"] == "channel":  # as int8, in the place of words
            del tensors[f"{path}.weight_packed"], tensors[f"{path}.weight_shape"]
            tensors[f"{path}.weight"] = (codes[path] - 128).to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    traced = trace(load_model(tmp_path / "base"), task="text-generation-with-past")
    report = export_onnx(traced, tmp_path / "export", accuracy_level=1)
    assert report.verification.passed
    exported = Exported(tmp_path / "export")
    for path in PATHS:
        flags, kept, zeros, scales = exported.layer(path)
        assert (flags["bits"], flags["block_size"]) == (bits, size)
        assert len(exported.product(path).input) == (3 if is_symmetric else 4)
        assert torch.equal(kept, codes[path])
        weight = floats.get_submodule(path).weight
        assert torch.allclose((kept - zeros) * scales, weight, rtol=2**-7, atol=0)  # theirs are rounded to bfloat16
    assert distance(logits(floats), logits(load(tmp_path / "export"))) < 1e-2


@pytest.mark.parametrize("packed", [False, True])
def test_those_of_llm_int8_are_kept_in_conv1d_too(packed: bool, tmp_path: Path) -> None:
    base = float_base(tmp_path / "floats", "GPT2LMHeadModel")
    in_eight_bits(base).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    model = load_model(tmp_path / "base", packed=packed)
    report = export_onnx(trace(model, task="text-generation-with-past"), tmp_path / "export", accuracy_level=1)
    assert (report.quantization.kind, report.quantization.bits) == ("kept", 8)
    exported, found = Exported(tmp_path / "export"), 0
    for key, stored in tensors.items():
        if stored.dtype == torch.int8:
            path = key.removesuffix(".weight")
            _, kept, zeros, _ = exported.layer(path)
            assert torch.equal(kept - zeros, stored.long())
            found += 1
    assert found == 4 * model.config.n_layer
    assert distance(logits(load_model(tmp_path / "base")), logits(load(tmp_path / "export"))) < 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of GPTQ in groups of 128 in an order of its own, and an adapter of PEFT beside it."""
    folder = tmp_path_factory.mktemp("base")
    floats = checkpoint(folder, "gptq of 128 in an order of its own", **WIDE)
    theirs = peft_model(floats, method="LORA", r=4, lora_alpha=1, target_modules=["q_proj", "down_proj"])
    theirs.save_pretrained(str(folder / "adapter"))
    return folder


@pytest.fixture(scope="module")
def floats(base: Path) -> nn.Module:
    return load_model(base)


@pytest.fixture(scope="module")
def adapted(floats: nn.Module, base: Path) -> nn.Module:
    return peft_model(load_model(base), method="LORA", r=4, lora_alpha=1, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def kept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "export"
    export_onnx(trace(load_model(base), task="text-generation-with-past"), folder, accuracy_level=1)
    return folder


def test_products_of_one_input_share_its_other_order(kept: Path) -> None:
    graph = onnx.load(kept / "model.onnx", load_external_data=False).graph
    orders = [node.input[1] for node in graph.node if node.op_type == "Gather" and "input_order" in node.input[1]]
    assert len(orders) == 4  # of queries, keys and values; of what attention gives; of gate and up; of down
    assert len(set(orders)) == 2  # of each width


def test_an_adapter_beside_kept_integers_reads_the_input_in_its_own_order(
    base: Path, floats: nn.Module, adapted: nn.Module, tmp_path: Path
) -> None:
    traced = trace(load_model(base), task="text-generation-with-past")
    model = GraloraModel.from_pretrained(traced, base / "adapter", adapter_name="news")
    report = export_onnx(model, tmp_path / "export", adapters="data", accuracy_level=1)
    assert report.quantization.kind == "kept"
    assert not any(layer.reason for layer in report.quantization.layers.values())
    served = load(tmp_path / "export")
    assert distance(logits(adapted), served(input_ids=IDS, adapter="news").logits[:, -1:]) < 1e-3
    assert distance(logits(floats), logits(served)) < 1e-3
    rows = served.generate([[5, 6, 7], [9, 4]], adapter=["news", None], max_new_tokens=4)
    for row, (ids, reference) in zip(rows, (([5, 6, 7], adapted), ([9, 4], floats)), strict=True):
        expected = reference.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False)
        assert list(row)[-4:] == expected[0, -4:].tolist()


def test_a_merged_layer_is_rounded_anew_and_the_report_says_so(base: Path, adapted: nn.Module, tmp_path: Path) -> None:
    traced = trace(load_model(base), task="text-generation-with-past")
    model = GraloraModel.from_pretrained(traced, base / "adapter")
    report = export_onnx(model, tmp_path / "export")
    changed = {name for name, layer in report.quantization.layers.items() if layer.reason is not None}
    assert changed == {f"{PATHS[0]}.weight", f"{PATHS[-1]}.weight"}
    assert "2 in int8 in blocks of 32: an adapter is merged into it" in str(report.quantization)
    assert report.quality.tokens[0].kl_divergence < 0.01
    assert read_manifest(tmp_path / "export").quantization == report.quantization
    assert distance(logits(adapted), logits(load(tmp_path / "export"))) < 0.1
    unverified = export_onnx(model, tmp_path / "export", verify=False)
    note = "2 matrices of the checkpoint rounded anew: an adapter is merged into it"
    assert all(note in str(one).splitlines()[-1] for one in (report, unverified))
    with_floats = export_onnx(model, tmp_path / "export", quantize="float")
    assert with_floats.quantization is None
    assert distance(logits(adapted), logits(load(tmp_path / "export"))) < 1e-5


def test_int4_rounds_what_the_checkpoint_has_in_floats_alone(base: Path, kept: Path, tmp_path: Path) -> None:
    traced = trace(load_model(base), task="text-generation-with-past")
    report = export_onnx(traced, tmp_path / "export", quantize="int4", block_size=32, verify=False)
    assert (
        report.quantization.layers["lm_head.weight"].form == "int8 in blocks of 32"
    )  # 0.5 bits of all are left for it
    before, after = Exported(kept), Exported(tmp_path / "export")
    for path in PATHS:
        flags, *parts = after.layer(path)
        assert flags["block_size"] == 32  # several blocks of a group, of one scale
        assert all(torch.equal(*pair) for pair in zip(parts, before.layer(path)[1:], strict=True))


def test_a_streamed_checkpoint_has_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for name, opened in (("whole", load_model), ("streamed", load_streamed)):
        export_onnx(trace(opened(base), task="text-generation-with-past"), tmp_path / name, verify=False)
    whole, streamed = (tmp_path / name / "model.onnx_data" for name in ("whole", "streamed"))
    assert whole.read_bytes() == streamed.read_bytes()


def test_a_weight_that_was_changed_is_rounded_anew(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    with torch.no_grad():
        model.get_submodule(PATHS[2]).weight[3, 4] += 0.25
    report = export_onnx(trace(model, task="text-generation-with-past"), tmp_path / "export", verify=False)
    reasons = {name: layer.reason for name, layer in report.quantization.layers.items() if layer.reason}
    assert reasons == {f"{PATHS[2]}.weight": "its weight has changed since it was loaded"}


def test_an_adapter_is_folded_into_kept_integers_in_another_order(base: Path, kept: Path, tmp_path: Path) -> None:
    merged = peft_model(load_model(base), method="LORA", r=4, lora_alpha=1, target_modules=["q_proj", "down_proj"])
    weights = merged.merge_and_unload().state_dict()
    fold_onnx(kept, base / "adapter", tmp_path / "out", base=base, requantize=True, force=True)
    exported = Exported(tmp_path / "out")
    for path in (PATHS[0], PATHS[-1]):
        flags, codes, zeros, scales = exported.layer(path)
        assert flags["block_size"] == 128
        assert ((codes - zeros) * scales - weights[f"{path}.weight"]).abs().max() <= 1.01 * scales.max()


def test_groups_that_no_block_holds_and_fp8_are_rounded_anew(tmp_path: Path) -> None:
    CASES["gptq of 8"] = (gptq(4, size=8), {"quant_method": "gptq", "bits": 4, "group_size": 8})
    for name, reason in (
        ("gptq of 8", "no block of 16 inputs or more has one scale (groups of 8)"),
        ("fp8", "FP8 has"),
    ):
        checkpoint(tmp_path / name, name)
        report = export_onnx(trace(load_model(tmp_path / name)), tmp_path / "export", overwrite=True)
        assert report.quantization.kind == "int8"
        assert f"7 in int8 in blocks of 32: {reason}" in str(report.quantization)
        assert report.quality.outputs[0].argmax_agreement > 0.5


def test_experts_are_rounded_anew_as_they_are_stacked(tmp_path: Path) -> None:
    tiny_model("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    file, make = tmp_path / "base" / "model.safetensors", gptq(4)
    tensors = load_file(file)
    for key in [key for key in tensors if "_proj.weight" in key or ".experts." in key]:
        parts, _ = make(*tensors.pop(key).shape)
        tensors |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
    save_file(tensors, file, {"format": "pt"})
    describe(tmp_path / "base", {"quant_method": "gptq", "bits": 4, "group_size": 32})
    for opened in (load_model, load_streamed):
        traced = trace(opened(tmp_path / "base"), task="text-generation-with-past")
        report = export_onnx(traced, tmp_path / "export", verify=opened is load_model)
        forms = {name: layer.form for name, layer in report.quantization.layers.items()}
        reasons = {name: layer.reason for name, layer in report.quantization.layers.items() if layer.reason}
        assert set(reasons.values()) == {"it stacks several matrices"}
        assert all(("experts" in name) == (name in reasons) for name in forms)
        assert all(("kept int4" in form) == (name not in reasons) for name, form in forms.items())
        assert report.quantization.multiplications > 0


def test_a_zero_point_beyond_four_bits_has_codes_of_eight(tmp_path: Path) -> None:
    """GPTQ stores zero points less one, so that the largest of four bits is 16."""
    floats = checkpoint(tmp_path / "base", "gptq 4")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{PATHS[-1]}.qzeros"][0, 0] |= 15
    save_file(tensors, file, {"format": "pt"})
    model = load_model(tmp_path / "base")
    assert not torch.equal(model.get_submodule(PATHS[-1]).weight, floats.get_submodule(PATHS[-1]).weight)
    export_onnx(trace(model), tmp_path / "export", accuracy_level=1)
    flags, _, zeros, _ = Exported(tmp_path / "export").layer(PATHS[-1])
    assert (flags["bits"], int(zeros[0, 0])) == (8, 16)
    assert Exported(tmp_path / "export").layer(PATHS[0])[0]["bits"] == 4


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    floats = trace(tiny_model("llama", **SIZES))
    with pytest.raises(
        ExportError, match="quantize='kept' keeps the integers of a quantized checkpoint, and this base"
    ):
        export_onnx(floats, tmp_path / "export", quantize="kept")
    for given in ({"block_size": 32}, {"bits": 5}, {"texts": ["a", "b"]}):
        with pytest.raises(ExportError, match=r"has no effect with|nothing is quantized"):
            export_onnx(floats, tmp_path / "export", quantize="float", **given)


def test_the_command_keeps_them(base: Path, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("adapter"))
    arguments = ["export", f"--model={tmp_path / 'base'}", f"--output={tmp_path / 'out'}", "--quantize=kept"]
    result = CliRunner().invoke(app, [*arguments, "--accuracy-level=1", "--no-verify", "--no-tokenizer"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "gralora_export.json").read_text())["quantization"]["kind"] == "kept"
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == (kept / "model.onnx_data").read_bytes()
