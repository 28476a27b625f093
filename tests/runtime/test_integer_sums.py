"""Products of int8 are added exactly on every processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.run.sessions import integer_sums
from gralora_fx.run.sessions.session import Runtime, open_session, quiet_options
from gralora_fx.serving import load


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a processor without VNNI, as far as can be told."""
    monkeypatch.setattr(integer_sums, "adds_exactly", lambda: False)


@pytest.mark.usefixtures("saturating")
def test_where_sums_saturate_products_are_of_uint8_and_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder, read alone and in rows, with a head that an embedding is tied to."""
    model = tiny_model("llama", tie_word_embeddings=True)
    export_onnx(trace(model.eval(), task="text-generation-with-past"), tmp_path / "onnx", quantize="int8-dynamic")
    ids = np.random.default_rng(0).integers(3, 90, (2, 7))
    options: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 9}
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    offset = load(tmp_path / "onnx")
    monkeypatch.setattr(integer_sums, "adds_exactly", lambda: True)
    usual = load(tmp_path / "onnx")
    assert offset.generate(**options) == usual.generate(**options)
    assert (offset(**feed).logits == usual(**feed).logits).all()


def test_every_product_is_still_one_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_onnx(trace(nn.Linear(32, 32), (torch.randn(2, 32),)), tmp_path / "onnx", quantize="int8-dynamic")
    found = []
    for adds_exactly in (True, False):
        monkeypatch.setattr(integer_sums, "adds_exactly", lambda known=adds_exactly: known)
        options = quiet_options()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        open_session(tmp_path / "onnx", Runtime(session_options=options))
        optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
        (weight,) = {node.input[1] for node in optimized.node if node.op_type == "MatMulIntegerToFloat"}
        found.append(next(tensor.data_type for tensor in optimized.initializer if tensor.name == weight))
    assert found == [onnx.TensorProto.INT8, onnx.TensorProto.UINT8]


def test_weights_that_are_multiplied_by_nothing_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An export in int8 has no such products."""
    export_onnx(trace(nn.Linear(32, 32), (torch.randn(2, 32),)), tmp_path / "onnx", quantize="int8", verify=False)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    assert not integer_sums.offset_weights(model, model.graph.node)
    assert model.SerializeToString(deterministic=True) == before


def test_the_probe_agrees_with_numpy() -> None:
    """On a machine where sums saturate, the probe says so: it is the runtime's own product."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "vnni" not in flags:
        pytest.skip("needs a processor that is known to add exactly")
    assert np.iinfo(np.int16).max < 2 * 255 * 127
    assert integer_sums.adds_exactly()
