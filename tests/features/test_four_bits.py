"""Weights that bitsandbytes stored in four bits, read as floats; bitsandbytes' own arithmetic is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gralora_fx.base.sources.base_quantization import BaseQuantization, packed_quantization
from gralora_fx.base.sources.saved_weights import SINGLE_NAME, SavedWeights, read_weights
from gralora_fx.errors import CheckpointError, ConfigError
from gralora_fx.features.nf4.four_bits import FourBits

bnb = pytest.importorskip("bitsandbytes")
STATE = "quant_state.bitsandbytes__nf4"


def packed(weight: Tensor, quantization: FourBits) -> dict[str, Tensor]:
    """Return a weight as bitsandbytes stores it, by the ends of its keys."""
    codes, state = bnb.functional.quantize_4bit(
        weight,
        blocksize=quantization.block_size,
        compress_statistics=quantization.double,
        quant_type=quantization.kind,
    )
    return {"": codes, **{f".{name}": value for name, value in state.as_dict(packed=True).items()}}


def reference(weight: Tensor, quantization: FourBits) -> Tensor:
    """Dequantize by bitsandbytes' formula: its kernel for AVX-512 needs rows of whole blocks."""
    codes, state = bnb.functional.quantize_4bit(
        weight,
        blocksize=quantization.block_size,
        compress_statistics=quantization.double,
        quant_type=quantization.kind,
    )
    scales = state.absmax
    if quantization.double:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    pairs = torch.stack((codes.reshape(-1) >> 4, codes.reshape(-1) & 15), dim=-1).reshape(-1)[: weight.numel()].long()
    values = state.code[pairs] * scales.repeat_interleave(quantization.block_size)[: weight.numel()]
    return values.reshape(weight.shape)


def save(directory: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / SINGLE_NAME)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **fields}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return directory


def saved(directory: Path, weight: Tensor, quantization: FourBits, **fields: Any) -> SavedWeights:
    tensors = {f"a.weight{end}": tensor for end, tensor in packed(weight, quantization).items()}
    return read_weights(save(directory, {**tensors, "b.weight": torch.ones(3)}, **fields))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("shape", [(96, 128), (50, 30), (7, 33), (300, 257)])
def test_values_are_bitsandbytes_own(
    tmp_path: Path, kind: str, double: bool, block_size: int, shape: tuple[int, int]
) -> None:
    quantization = FourBits(kind, block_size, double)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weights = saved(tmp_path, weight, quantization, bnb_4bit_quant_type=kind)
    expected = reference(weight, quantization)
    tensor = weights.tensors["a.weight"]
    assert set(weights.tensors) == {"a.weight", "b.weight"}
    assert tensor.shape == shape
    assert torch.equal(tensor(), expected)
    part = np.empty(11, np.uint8)  # bytes in the middle of values, across a block
    tensor.read_into(part, 4 * block_size - 5)
    assert part.tobytes() == expected.numpy().tobytes()[4 * block_size - 5 :][:11]
    assert np.array_equal(np.concatenate([block.copy() for block in tensor.blocks()]), expected.numpy().reshape(-1))
    assert weights.quantization == quantization


def test_the_error_of_four_bits_is_what_it_is_known_to_be(tmp_path: Path) -> None:
    weight = torch.randn(256, 256)
    values = saved(tmp_path, weight, FourBits()).tensors["a.weight"]()
    assert 0.05 < float((values - weight).norm() / weight.norm()) < 0.1


def test_values_are_rounded_to_the_dtype_of_products(tmp_path: Path) -> None:
    weight, quantization = torch.randn(64, 64), FourBits()
    tensor = saved(tmp_path, weight, quantization, bnb_4bit_compute_dtype="bfloat16").tensors["a.weight"]
    assert tensor.dtype == "BF16"
    assert torch.equal(tensor(), reference(weight, quantization).to(torch.bfloat16))


def test_a_weight_is_turned_for_conv1d(tmp_path: Path) -> None:
    weight, quantization = torch.randn(64, 96), FourBits(double=True)
    turned = saved(tmp_path, weight, quantization).tensors["a.weight"].turned()  # type: ignore[attr-defined]
    assert turned.shape == (96, 64)
    assert torch.equal(turned(), reference(weight, quantization).T)
    assert turned.turned().shape == (64, 96)


def changed(tensors: dict[str, Tensor], **fields: Any) -> dict[str, Tensor]:
    """Return stored tensors with some fields of the state changed; None takes one out."""
    state = json.loads(bytes(tensors[f"a.weight.{STATE}"].tolist())) | fields
    text = json.dumps({name: value for name, value in state.items() if value is not None}).encode()
    return {**tensors, f"a.weight.{STATE}": torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("fields", "gone", "message"),
    [
        ({"blocksize": 48}, "", "its block size is 48; known are 32, 64"),
        ({"blocksize": None}, "", "its block size is None"),
        ({"blocksize": 128}, "", "2048 bytes and 64 scales are not those of .64, 64. in blocks of 128"),
        ({"shape": [64, 64, 1]}, "", "not that of a matrix"),
        ({"nested_blocksize": 0}, "", "its scales are quantized in blocks of 0"),
        ({}, "absmax", "absmax is missing"),
        ({}, "nested_absmax", "nested_absmax is missing"),
        ({}, STATE, "stored as integers without a.weight.quant_state.bitsandbytes__nf4"),
        ({}, "", ""),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, fields: dict[str, Any], gone: str, message: str) -> None:
    saved(tmp_path, torch.randn(64, 64), FourBits(double=True))
    tensors = changed(load_file(tmp_path / SINGLE_NAME), **fields)
    save(tmp_path, {key: tensor for key, tensor in tensors.items() if key != f"a.weight.{gone}"})
    if not message:
        assert read_weights(tmp_path).tensors["a.weight"].shape == (64, 64)
        return
    with pytest.raises(CheckpointError, match=message) as raised:
        _ = read_weights(tmp_path).tensors
    assert "a.weight" in str(raised.value)


def test_a_state_that_is_not_json(tmp_path: Path) -> None:
    saved(tmp_path, torch.randn(64, 64), FourBits())
    tensors = load_file(tmp_path / SINGLE_NAME)
    save(tmp_path, {**tensors, f"a.weight.{STATE}": torch.zeros(5, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="quant_state is not JSON"):
        _ = read_weights(tmp_path).tensors


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("nf4", FourBits()),
        ("NF4-double", FourBits(double=True)),
        ("nf4-double-128-bfloat16", FourBits("nf4", 128, True, "bfloat16")),
        ("fp4-float16", FourBits("fp4", compute_dtype="float16")),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, FourBits()),
        (
            FourBits("nf4", 128, skip_modules=("lm_head",)).to_dict(),
            FourBits("nf4", 128, False, "float32", ("lm_head",)),
        ),
    ],
)
def test_what_tells_a_quantization(given: Any, expected: FourBits) -> None:
    assert BaseQuantization.of(given) == expected
    assert BaseQuantization.of(str(expected)).has_weights_of(expected)
    assert BaseQuantization.of(json.loads(json.dumps(expected.to_dict()))) == expected


def test_a_config_of_transformers_tells_it() -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    assert BaseQuantization.of(config) == FourBits("nf4", 64, True, "bfloat16", ("lm_head",))


@pytest.mark.parametrize(
    "given", ["nf3", "nf4-48", "nf4-double-double", "nf4-int8", "", 4, None, {"load_in_16bit": True}]
)
def test_what_is_none(given: Any) -> None:
    with pytest.raises(ConfigError, match="quantization"):
        BaseQuantization.of(given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "hqq"}, "quantized by HQQ, which is not read"),
        (
            {"quant_method": "gptq", "bits": 5},
            "quantized by GPTQ in a way that is not read .bits of GPTQ is 5, and 2, 3, 4, 8 are",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "version of AWQ is 'gemv', and gemm"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "format of compressed-tensors is 'nvf",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
            "quantized by bitsandbytes, which is not read",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "kind of a base"),
    ],
)
def test_other_quantized_checkpoints_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        packed_quantization({"quantization_config": fields}, "the base", CheckpointError)


def test_what_transformers_reads_as_floats_is_none() -> None:
    assert packed_quantization({"quantization_config": {"quant_method": "mxfp4"}}, "it", CheckpointError) is None
    assert packed_quantization({}, "it", CheckpointError) is None
