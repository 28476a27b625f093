"""Checkpoints of quantizers, written by formulas of their own, and the floats that they stand for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor, nn

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
Parts = dict[str, Tensor]
Maker = Callable[[int, int], tuple[Parts, Tensor]]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, count]` in words of 32 bits, from the lowest bit on: a long number for each row, cut into words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([number >> (32 * word) & 0xFFFFFFFF for word in range(len(row) * bits // 32)])
    unsigned = torch.tensor(rows)
    return (unsigned - (unsigned >= 2**31).long() * 2**32).int()


def codes_of(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of rows of words, in the same way."""
    rows = []
    for row in packed.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        rows.append([number >> (bits * place) & (2**bits - 1) for place in range(count)])
    return torch.tensor(rows)


def gptq(bits: int, *, acts: bool = False, v2: bool = False, size: int = 32, symmetric: bool = False) -> Maker:
    def make(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
        count = 1 if size < 0 else -(-inputs // size)
        groups = torch.zeros(inputs, dtype=torch.long) if size < 0 else torch.arange(inputs) // size
        if acts:  # one order for layers of the same width, as of those that read the same
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        codes = torch.randint(0, 2**bits, (outputs, inputs))
        zeros = torch.randint(1, 2**bits, (outputs, count))
        zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
        scales = (0.01 + torch.rand(outputs, count) / 50).half()
        parts = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words(zeros.T - int(not v2), bits),
            "scales": scales.T.contiguous(),
            "g_idx": groups.int(),
        }
        return parts, scales[:, groups] * (codes - zeros[:, groups]).half()

    return make


def awq(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
    codes, zeros = torch.randint(0, 16, (inputs, outputs)), torch.randint(0, 16, (inputs // 32, outputs))
    scales = (0.01 + torch.rand(inputs // 32, outputs) / 50).half()

    def packed(values: Tensor) -> Tensor:
        return words(values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].flatten(1), 4)

    weight = (codes - zeros.repeat_interleave(32, 0)).half() * scales.repeat_interleave(32, 0)
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, weight.T


def fp8(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
    stored = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    scales = 0.01 + torch.rand(-(-outputs // 64), -(-inputs // 64)) / 50
    each = scales.repeat_interleave(64, 0)[:outputs].repeat_interleave(64, 1)[:, :inputs]
    return {"weight": stored, "weight_scale_inv": scales}, stored.float() * each


CASES: dict[str, tuple[Maker, dict[str, Any]]] = {
    **{f"gptq {bits}": (gptq(bits), {"quant_method": "gptq", "bits": bits}) for bits in (2, 3, 4, 8)},
    "gptq in an order of its own": (gptq(4, acts=True), {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "gptq v2": (gptq(4, v2=True), {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
}


def checkpoint(folder: Path, name: str, **sizes: Any) -> nn.Module:
    """Write a quantized Llama, and return it in floats; its head stays float."""
    make, quantization = CASES[name]
    model = tiny_model("llama", **{**SIZES, **sizes})
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "lm_head":
            parts, weight = make(layer.out_features, layer.in_features)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
            layer.weight.data = weight.float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    describe(folder, quantization)
    return model


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))


def compressed(folder: Path, weights: dict[str, Any], **sizes: Any) -> nn.Module:
    """Write a Llama that compressed-tensors' own library quantizes, and return it as that decompresses it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = tiny_model("llama", **{**SIZES, **sizes}, dtype=torch.bfloat16)
    model = copy.deepcopy(base)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    config.quantization_status = quantization.QuantizationStatus.FROZEN
    quantization.apply_quantization_config(model, config)
    for layer in model.modules():
        if getattr(layer, "quantization_scheme", None) is not None:
            kind, weight = layer.quantization_scheme.weights, layer.weight.data
            parts = weight.reshape(len(weight), -1, kind.group_size) if kind.group_size else weight
            extremes = (weight.min(), weight.max()) if kind.strategy == "tensor" else (parts.amin(-1), parts.amax(-1))
            found = quantization.utils.calculate_qparams(*extremes, kind)
            for name, value in zip(("weight_scale", "weight_zero_point"), found, strict=True):
                if (parameter := getattr(layer, name, None)) is not None:
                    parameter.data = value.to(parameter.dtype).reshape(parameter.shape)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    base.save_pretrained(folder)
    stored = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return model
