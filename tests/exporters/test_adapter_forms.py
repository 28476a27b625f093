"""The form of adapters as data, by a rule that the export reports; several `gralora_k` in one export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_oracle import peft_model
from tiny_models import text_batch, tiny_model
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.exporters.kinds.data_sites import takes_blocks
from gralora_fx.serving import load

TARGETS = ["query", "dense"]


def gralora(r: int, k: int) -> GraloraConfig:
    return GraloraConfig(r=r, gralora_k=k, target_modules=TARGETS, init_weights=False)


@pytest.mark.parametrize(
    ("configs", "in_float", "quantized"),
    [
        ([gralora(8, 2)], True, False),
        ([gralora(10, 2)], True, True),
        ([gralora(4, 4)], True, False),
        ([gralora(8, 4)], True, True),
        ([gralora(2, 2), gralora(16, 2)], True, True),  # the larger one decides
        ([gralora(8, 2), LoraConfig(r=64, target_modules=TARGETS)], True, False),  # which has no blocks
        ([gralora(32, 2), gralora(32, 4)], False, False),
        ([LoraConfig(r=64, target_modules=TARGETS)], False, False),
    ],
)
def test_the_rule(configs: list[Any], in_float: bool, quantized: bool) -> None:
    model = rewrite(fresh_trace("bert"), configs[0])
    for index, config in enumerate(configs[1:]):
        model.add_adapter(f"more{index}", config)
    assert takes_blocks(model, is_quantized=False) is in_float
    assert takes_blocks(model, is_quantized=True) is quantized


def test_the_report_says_which(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("bert"), gralora(8, 2))
    report = export_onnx(model, tmp_path / "blocks", adapters="data", verify=False)
    assert "(data): GraLoRA of gralora_k=2, which this export fixes, or LoRA" in report.details
    report = export_onnx(model, tmp_path / "lora", adapters="data", quantize="int4", verify=False)
    assert "(data): LoRA, or GraLoRA of any gralora_k as the LoRA that it equals" in report.details


def test_adapters_of_several_blocks_share_an_export(tmp_path: Path) -> None:
    oracles = {}
    for name, k in (("two", 2), ("four", 4)):
        fields = {"r": 8, "gralora_k": k, "alpha": 16, "target_modules": TARGETS}
        oracles[name] = peft_model(tiny_model("bert"), k, **fields)
        oracles[name].save_pretrained(str(tmp_path / name))
    model = GraloraModel.from_pretrained(trace(tiny_model("bert")), tmp_path / "two", adapter_name="two")
    model.load_adapter(tmp_path / "four", "four")
    model.set_adapter("two")
    report = export_onnx(model, tmp_path / "onnx", adapters="data")
    assert report.verification is not None
    assert report.verification.passed
    export_adapter(tmp_path / "four", tmp_path / "onnx", "four")
    served, inputs = load(tmp_path / "onnx"), text_batch(2, 7)
    rows = served(**inputs, adapter=["four", "two"])[0]
    for row, name in enumerate(("four", "two")):
        with torch.no_grad():
            expected = oracles[name](**inputs)[0].numpy()
        assert np.abs(served(**inputs, adapter=name)[0].numpy() - expected).max() <= 1e-4
        assert np.abs(rows[row].numpy() - expected[row]).max() <= 1e-4
