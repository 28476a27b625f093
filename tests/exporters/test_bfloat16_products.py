"""Products in bfloat16 of models that draw texts and are measured: close to float32's, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from traces import fresh_trace, inputs_of

from gralora_fx.core.loading.bases import load_traced
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.quantize import bfloat16_products, block_search
from gralora_fx.exporters.quantize.bfloat16_products import Bfloat16Product, with_bfloat16_products
from gralora_fx.exporters.quantize.round_in_order import Moments
from gralora_fx.exporters.quantize.sensitivity import Sensitivities, measure_sensitivities

CACHED = "text-generation-with-past"


@pytest.fixture
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply in bfloat16 on any processor, whatever a weight's size."""
    monkeypatch.setattr(bfloat16_products, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(block_search, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(bfloat16_products, "_LEAST", 0)


def products(model: TracedModel) -> int:
    """Count the products in bfloat16."""
    return sum(isinstance(node.target, Bfloat16Product) for node in model.graph_module.graph.nodes)


@pytest.mark.quick
@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_outputs_are_close_to_those_of_the_model_which_is_unchanged(name: str) -> None:
    traced, inputs = fresh_trace(name), inputs_of(name)
    traced.eval()
    with torch.no_grad():
        expected = _values(traced(**inputs))
        narrow = with_bfloat16_products(traced)
        actual, again = _values(narrow(**inputs)), _values(traced(**inputs))
    assert products(narrow) == sum(len(site.calls) for site in traced.sites)
    assert products(traced) == 0
    assert torch.equal(expected, again)
    assert actual.dtype == torch.float32
    assert 0 < float((actual - expected).abs().max()) < 2**-5 * float(expected.abs().max())


def _values(outputs: Any) -> Tensor:
    first: Tensor = (
        outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else next(iter(outputs.values()))
    )
    return first


@pytest.mark.quick
@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_measurements_are_close_to_those_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weight on either side of a product, whose gradient is computed in bfloat16 too."""
    traced = fresh_trace(name)
    traced.eval()

    def measured() -> Sensitivities:
        return measure_sensitivities(traced, [inputs_of(name)])

    narrow = measured()
    monkeypatch.setattr(bfloat16_products, "multiplies_bfloat16", lambda: False)
    usual = measured()
    assert narrow.layers.keys() == usual.layers.keys()
    for path, layer in usual.layers.items():
        for part in ("inputs", "outputs"):
            expected, actual = getattr(layer, part), getattr(narrow.layers[path], part)
            assert torch.allclose(expected, actual, rtol=0.1, atol=0.02 * float(expected.max())), (path, part)
    assert any(not torch.equal(layer.outputs, narrow.layers[path].outputs) for path, layer in usual.layers.items())


@pytest.mark.quick
def test_small_weights_and_processors_without_such_products_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = fresh_trace("llama")
    monkeypatch.setattr(bfloat16_products, "multiplies_bfloat16", lambda: True)
    assert with_bfloat16_products(traced) is traced  # its weights are small
    monkeypatch.setattr(bfloat16_products, "_LEAST", 0)
    monkeypatch.setattr(bfloat16_products, "multiplies_bfloat16", lambda: False)
    assert with_bfloat16_products(traced) is traced


@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_streamed_model_gives_the_bytes_of_one_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """The first reads the checkpoint's bfloat16 as it is, the second casts float32."""
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    for stream in (False, True):
        model = load_traced(str(tmp_path / "base"), None, CACHED, stream=stream)
        assert export_onnx(model, tmp_path / str(stream), quantize="int4").verification
    for file in ("model.onnx", "model.onnx_data", "gralora_export.json"):
        assert (tmp_path / "False" / file).read_bytes() == (tmp_path / "True" / file).read_bytes(), file


@pytest.mark.quick
@pytest.mark.parametrize("inputs", [96, 2048 + 64])  # one window, and two of which the second is in part empty
def test_moments_are_the_products_of_all_inputs_of_a_window(inputs: int) -> None:
    torch.manual_seed(0)
    cases = [torch.randn(positions, inputs) for positions in (40, 24)]
    moments = Moments.of(inputs, 32)
    for rows in cases:
        moments.add(rows)
    known = moments.products
    assert known is not None
    rows, width = torch.cat(cases), moments.shape[1]
    for index, means in enumerate(known.means):
        part = rows[:, index * width : (index + 1) * width]
        expected = torch.zeros(width, width)
        expected[: part.shape[1], : part.shape[1]] = part.T @ part / len(rows)
        assert torch.allclose(means, expected, atol=1e-5)
        assert torch.equal(means, means.T)
