"""An adapter folded into quantized weights: refused, or quantized again, with the share of the update that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fold_cases import (
    CACHED,
    PROJECTIONS,
    Case,
    gralora,
    tensors,
)
from tiny_models import tiny_model
from traces import fresh_trace

from gralora_fx import trace
from gralora_fx.errors import MergeError
from gralora_fx.exporters import export_onnx, fold_onnx
from gralora_fx.serving import load


@pytest.mark.parametrize("quantize", ["int4", "int8", "int8-dynamic"])
def test_quantized_weights_are_refused_unless_asked_for(quantize: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, fresh_trace("llama", task=CACHED), gralora(["q_proj", "down_proj"]), quantize=quantize)
    message = (
        r"_proj and 3 other layers are quantized.* fold before quantizing .*requantize=True \(--requantize\), best"
    )
    with pytest.raises(MergeError, match=message):
        case.fold()
    assert not case.out.exists()


@pytest.mark.parametrize("quantize", ["int4", "int8", "int8-dynamic"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_requantized_from_the_base_it_is_a_fresh_quantized_export(
    quantize: Any, precision: Any, tmp_path: Path
) -> None:
    if quantize == "int8-dynamic" and precision != "fp32":
        pytest.skip("int8-dynamic is float32 otherwise")
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    traced = trace(model, task=CACHED)
    case = Case(tmp_path, traced, gralora(PROJECTIONS), quantize=quantize, precision=precision)
    report = case.fold(requantize=True, base=tmp_path / "model")
    ours, theirs = tensors(case.out), tensors(case.export_fresh())
    for name, values in theirs.items():  # a value between two steps may go either way
        assert np.mean(ours[name] != values) <= 0.01 or np.allclose(ours[name], values, rtol=1e-3), name
    assert report.survival is not None
    assert 0.9 < report.survival < 1.1
    assert all(site.survival is not None and 0.5 < site.survival < 1.5 for site in report.sites)
    load(case.out, check=True)


@pytest.mark.parametrize("quantize", ["int4", "int8-dynamic"])
def test_an_update_that_rounding_takes_away_is_refused_unless_forced(quantize: Any, tmp_path: Path) -> None:
    """Dequantized weights are on the grid, to which they return after a small update."""
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["q_proj", "down_proj"], alpha=0.004), quantize=quantize)
    with pytest.raises(
        MergeError, match=r"rounding leaves -?\d+ % of the update, and half or less of it at 4 of 4 layers"
    ):
        case.fold(requantize=True)
    assert not case.out.exists()
    report = case.fold(requantize=True, force=True)
    assert report.survival is not None
    assert report.survival < 0.5
    assert "% of the update" in str(report)


def test_layers_without_an_update_keep_their_blocks_bit_for_bit(tmp_path: Path) -> None:
    traced = fresh_trace("llama", task=CACHED)
    case = Case(tmp_path, traced, gralora(["k_proj"], gralora_k=2, alpha=200), quantize="int4", block_size=16)
    case.fold(requantize=True, force=True)
    before, after = tensors(case.base), tensors(case.out)
    name = "model.onnx:model.layers.0.self_attn.q_proj+k_proj+v_proj.weight_Q4"
    changed = np.any(before[name] != after[name], axis=(1, 2))
    assert not changed[:32].any()
    assert changed[32:48].any()
    assert not changed[48:].any()


def test_the_share_that_survives_is_the_projection_on_the_update(tmp_path: Path) -> None:
    model = tiny_model("llama")
    case = Case(tmp_path, trace(model, task=CACHED), gralora(["o_proj"], alpha=40), quantize="int8")
    report = case.fold(requantize=True, force=True)
    site = report.sites[0]
    float_case = tmp_path / "float"
    export_onnx(trace(model, task=CACHED), float_case, verify=False)
    fold_onnx(float_case, case.adapter, tmp_path / "float_folded")
    name = "model.onnx:model.layers.0.self_attn.o_proj.weight"
    update = tensors(tmp_path / "float_folded")[name] - tensors(float_case)[name]  # [in, out]

    def dequantized(directory: Path) -> np.ndarray:
        found = tensors(directory)
        values, scales = found[f"{name}_Q8"].astype(np.float32) - 128, found[f"{name}_scales"]
        return (values * scales[..., None]).reshape(32, 32).T

    change = dequantized(case.out) - dequantized(case.base)
    assert site.survival == pytest.approx(float((change * update).sum() / (update * update).sum()), rel=1e-3)
