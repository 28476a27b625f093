"""Exports that keep the integers of quantized checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from peft_oracle import peft_model
from quantized_checkpoints import AWQ_ORDER, CASES, SIZES, Parts, checkpoint, codes_of, gptq
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor, nn

from gralora_fx import GraloraModel, trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, fold_onnx, verify_onnx
from gralora_fx.exporters.reports import ExportReport
from gralora_fx.format.manifest import read_manifest
from gralora_fx.loading import load_model, load_streamed
from gralora_fx.serving import load

IDS = torch.tensor([[5, 6, 7, 8]])
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.0.{layer}" for layer in LAYERS]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1:]


def distance(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


def stored_codes(parts: Parts, method: str, bits: int) -> tuple[Tensor, Tensor]:
    """The integers `[out, in]` and the zero points `[out, groups]` of a checkpoint's layer, word by word."""
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
        """The attributes, the integers `[out, in]`, the zero points and the scales of the groups of each input."""
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

    @staticmethod
    def _integers(stored: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
        if bits == 4:
            stored = np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)
        return stored.astype(np.int64)


# name in `CASES` (or a maker and its configuration), sizes, and the bits and blocks of the export
KEPT: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "gptq 3": ("gptq 3", {}, 4, 32),
    "gptq 8": ("gptq 8", {}, 8, 32),
    "gptq of 128 in an order of its own": ("gptq of 128 in an order of its own", WIDE, 4, 128),
    "gptq of whole rows": ("gptq of whole rows", {}, 4, 32),
    "awq": ("awq", {}, 4, 32),
}
CASES["gptq of 128 in an order of its own"] = (
    gptq(4, acts=True, size=128, symmetric=True),
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
)
CASES["gptq of whole rows"] = (gptq(4, size=-1), {"quant_method": "gptq", "bits": 4, "group_size": -1})


@pytest.mark.parametrize("case", KEPT)
def test_the_integers_of_an_export_are_those_of_the_checkpoint(case: str, tmp_path: Path) -> None:
    name, sizes, bits, block_size = KEPT[case]
    floats = checkpoint(tmp_path / "base", name, **sizes)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    traced = trace(load_model(tmp_path / "base"), task="text-generation-with-past")
    report = export_onnx(traced, tmp_path / "export", accuracy_level=1)
    assert report.verification.passed
    assert report.quantization.kind == "kept"
    assert report.quantization.bits == bits
    exported, config = Exported(tmp_path / "export"), CASES[name][1]
    for path in PATHS:
        parts = {
            key: tensors[f"{path}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")[: 3 + (case != "awq")]
        }
        codes, zeros = stored_codes(parts, config["quant_method"], config["bits"])
        groups = parts.get("g_idx", torch.arange(codes.shape[1]) // 32).long()
        flags, kept, zero_points, scales = exported.layer(path)
        assert (flags["bits"], flags["block_size"]) == (bits, block_size)
        assert torch.equal(kept, codes)
        assert torch.equal(zero_points, zeros[:, groups])
        assert torch.equal(scales, parts["scales"].T[:, groups].float())
    assert distance(logits(floats), logits(load(tmp_path / "export"))) < 1e-3
