"""Bases of four bits: an adapter that PEFT trained on one has PEFT's outputs, loaded, exported and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from four_bit_bases import BASES, float_base, in_four_bits, inputs, trained
from safetensors.torch import load_file, save_file

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.core.loading.models import load_model, load_streamed
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.errors import CheckpointError, ConfigError, TraceError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.features.nf4.four_bits import FourBits
from gralora_fx.format.manifest import read_manifest
from gralora_fx.serving import load

pytest.importorskip("bitsandbytes")
LLAMA = "LlamaForCausalLM"
NF4, DOUBLE = FourBits(), FourBits(double=True)
CASES = [
    *((name, "LoRA", NF4) for name in BASES),
    *((LLAMA, method, DOUBLE) for method in ("GraLoRA", "DoRA")),
    *((name, "LoRA", FourBits(block_size=128, double=True)) for name in (LLAMA, "GPT2LMHeadModel")),
]


def distance(model: Any, case: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    """Return the largest difference of a model's logits from others, relative to the largest of these."""
    with torch.no_grad():
        return float((model.eval()(**case).logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("name", "method", "quantization"), CASES)
def test_an_adapter_on_it_has_pefts_outputs(tmp_path: Path, name: str, method: str, quantization: FourBits) -> None:
    base = float_base(tmp_path / "base", name)
    model = in_four_bits(base, quantization)
    model.save_pretrained(tmp_path / "packed")
    case = inputs(model)
    theirs = trained(model, method, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(**case).logits
    packed = [(tmp_path / "packed", None)] if method == "GraLoRA" else []
    for origin, asked in ((base, quantization), *packed):
        ours = load_traced(str(origin), str(tmp_path / "adapter"), None, base_quantization=asked)
        assert isinstance(ours, GraloraModel)
        assert distance(ours, case, expected) < 1e-5, origin
        assert BaseQuantization.of(ours.traced.config.base_quantization) == quantization
    if packed:
        assert distance(load_traced(str(base), str(tmp_path / "adapter"), None), case, expected) > 1e-3


@pytest.mark.parametrize("adapters", ["merged", "data"])
def test_its_export_has_pefts_logits(tmp_path: Path, adapters: str) -> None:
    base = float_base(tmp_path / "base", LLAMA)
    model = in_four_bits(base, DOUBLE)
    case = inputs(model)
    theirs = trained(model, "GraLoRA", tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(**case).logits.numpy()
    how: dict[str, Any] = {"with_cache": True, "base_quantization": "nf4-double"}
    ours = load_traced(str(base), str(tmp_path / "adapter"), None, **how)
    chosen = {"adapter": "default"} if adapters == "data" else {}
    far, same = {}, {}
    for quantize in (None, "int8"):
        export_onnx(ours, tmp_path / "export", adapters=adapters, quantize=quantize, logits="all", overwrite=True)
        served = load(tmp_path / "export")
        logits = served(input_ids=case["input_ids"].numpy(), **chosen)["logits"]
        far[quantize] = np.abs(logits - expected).max() / np.abs(expected).max()
        same[quantize] = (logits.argmax(-1) == expected.argmax(-1)).mean()
    assert far[None] < 1e-4
    assert same[None] == 1.0
    assert far["int8"] < 2e-2
    assert same["int8"] >= 0.94  # of 18 positions of a random model
    entry = read_manifest(tmp_path / "export").base
    assert entry is not None
    assert BaseQuantization.of(entry.quantization) == DOUBLE
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "quantization_config" not in config  # whose weights are floats
    assert verify_onnx(tmp_path / "export", ours).passed


@pytest.mark.parametrize("name", list(BASES))
def test_streamed_weights_are_the_same(tmp_path: Path, name: str) -> None:
    base = float_base(tmp_path / "base", name)
    in_four_bits(base, DOUBLE).save_pretrained(tmp_path / "packed")
    whole = load_model(tmp_path / "packed").state_dict()
    for streamed in (load_streamed(tmp_path / "packed"), load_streamed(base, base_quantization="nf4-double")):
        assert streamed.config.base_quantization == DOUBLE.to_dict()
        for key, parameter in streamed.named_parameters():
            assert torch.equal(values_of(parameter, key), whole[key]), key


def test_layers_that_are_skipped_stay_float(tmp_path: Path) -> None:
    base = float_base(tmp_path / "base", LLAMA)
    quantization = FourBits(skip_modules=("lm_head", "o_proj"))
    in_four_bits(base, quantization).save_pretrained(tmp_path / "packed")
    floats = load_model(base).state_dict()
    for model in (load_model(tmp_path / "packed"), load_model(base, base_quantization=quantization)):
        same = {key.split(".")[-2] for key, value in model.state_dict().items() if torch.equal(value, floats[key])}
        assert {"o_proj", "lm_head", "embed_tokens", "norm"} <= same
        assert not {"q_proj", "down_proj"} & same


def test_values_are_rounded_to_the_dtype_of_products(tmp_path: Path) -> None:
    base = float_base(tmp_path / "base", LLAMA)
    in_four_bits(base, FourBits(compute_dtype="bfloat16")).save_pretrained(tmp_path / "packed")
    packed = load_model(tmp_path / "packed").state_dict()
    rounded = load_model(base, base_quantization="nf4-bfloat16").state_dict()
    weight = packed["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, weight.to(torch.bfloat16).float())
    assert all(torch.equal(packed[key], rounded[key]) for key in packed)


def test_a_new_head_beside_four_bits(tmp_path: Path) -> None:
    base = float_base(tmp_path / "base", LLAMA)
    in_four_bits(base, NF4).save_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"missing score\.weight"):
        load_model(tmp_path / "packed", "text-classification", num_labels=4)
    model = load_model(tmp_path / "packed", "text-classification", num_labels=4, allow_random_head=True)
    assert model.get_parameter("score.weight").shape == (4, 128)


def test_what_is_quantized_is_not_rounded_again(tmp_path: Path) -> None:
    in_four_bits(float_base(tmp_path / "base", LLAMA), NF4).save_pretrained(tmp_path / "packed")
    for open_base in (load_model, load_streamed):
        with pytest.raises(ConfigError, match="is quantized already, and its own values are taken"):
            open_base(tmp_path / "packed", base_quantization="nf4")


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    in_four_bits(float_base(tmp_path / "base", LLAMA), NF4).save_pretrained(tmp_path / "packed")
    file, config = tmp_path / "packed" / "model.safetensors", tmp_path / "packed" / "config.json"
    tensors = load_file(file)
    gone = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, file, {"format": "pt"})
    for open_base in (load_model, load_streamed):
        with pytest.raises(CheckpointError, match=r"up_proj.weight is stored as integers without"):
            open_base(tmp_path / "packed")
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"quantization_config": {"quant_method": "hqq"}}))
    for open_base in (load_model, load_streamed):
        with pytest.raises(TraceError, match=r"quantized by HQQ, which is not read .*; give the float checkpoint"):
            open_base(tmp_path / "packed")


def test_what_bitsandbytes_loaded_is_not_traced(tmp_path: Path) -> None:
    model = in_four_bits(float_base(tmp_path / "base", LLAMA), NF4)
    with pytest.raises(TraceError, match="bitsandbytes quantized, whose products cannot be traced; load it with"):
        trace(model, task="text-generation")


def test_a_base_without_layers_to_round(tmp_path: Path) -> None:
    quantization = FourBits(skip_modules=("model", "lm_head"))
    with pytest.raises(ConfigError, match="has no effect"):
        load_model(float_base(tmp_path / "base", LLAMA), base_quantization=quantization)


def test_an_adapter_that_names_its_base_says_how_it_was_quantized(tmp_path: Path) -> None:
    base = float_base(tmp_path / "base", LLAMA)
    traced = load_traced(str(base), None, None, base_quantization="nf4-double")
    model = rewrite(traced, GraloraConfig(r=8, target_modules=["q_proj"], init_weights=False))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_quantization"] == DOUBLE.to_dict()
    )
    again = load_traced(None, str(tmp_path / "adapter"), None)
    case = inputs(load_model(base))
    assert torch.equal(again.eval()(**case).logits, model.eval()(**case).logits)
