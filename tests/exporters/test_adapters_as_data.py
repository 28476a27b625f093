"""Adapters as data of an export: any of PEFT's on one export is PEFT's model; none is the base, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapters_as_data import ADAPTERS, KINDS, Exports, add, arrays, expected_of, fields_of, output_of
from torch import Tensor, nn
from traces import relative_error

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load


class CrossAttention(nn.Module):
    """Attention whose keys and values are of another sequence than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        result: Tensor = self.out(self.attn(x, memory, memory, need_weights=False)[0])
        return result


def compare(exports: Exports, name: str, adapter: str, k: int, mode: str, tmp_path: Path) -> None:
    kind, served = KINDS[name], exports.adapted(name, k, mode)
    wrapped = add(served, kind, tmp_path / adapter, adapter, **fields_of(adapter, kind, k))
    expected = expected_of(wrapped, kind)
    with wrapped.disable_adapter():
        assert relative_error(expected_of(wrapped, kind), expected) > 1e-3  # the adapter does something
    assert relative_error(output_of(served, kind, adapter), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "k", "adapter"),
    [(name, k, adapter) for name in KINDS for k in (2, 4) for adapter in ADAPTERS if ADAPTERS[adapter]["r"] % k == 0],
)
def test_one_export_takes_any_adapter(exports: Exports, name: str, k: int, adapter: str, tmp_path: Path) -> None:
    compare(exports, name, adapter, k, "data", tmp_path)


@pytest.mark.parametrize("adapter", ["gralora-8-4", "lora-4"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "perceptron"])
def test_so_do_required_inputs(exports: Exports, name: str, adapter: str, tmp_path: Path) -> None:
    compare(exports, name, adapter, 2, "inputs", tmp_path)


@pytest.mark.parametrize(("name", "mode"), [*((name, "data") for name in KINDS), ("llama", "inputs"), ("t5", "inputs")])
def test_without_an_adapter_it_is_the_base_bit_for_bit(exports: Exports, name: str, mode: str) -> None:
    kind, served, base = KINDS[name], exports.adapted(name, 2, mode), exports.base(name)
    inputs = arrays(kind.batch())
    if kind.inputs is None:
        inputs = dict(zip(base.input_names, inputs.values(), strict=True))
    ours, theirs = served(**inputs), base(**inputs)
    assert served.output_names == base.output_names
    assert served.input_names == base.input_names
    for output in base.output_names:
        assert np.array_equal(ours[output], theirs[output]), output


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_goes_on_with_the_adapter(exports: Exports, name: str, tmp_path: Path) -> None:
    kind, served = KINDS[name], exports.adapted(name, 2)
    wrapped = add(served, kind, tmp_path / "a", "cached", r=4, gralora_k=2, target_modules=kind.targets)
    expected = expected_of(wrapped, kind)
    ids = kind.batch()["input_ids"][:1].numpy()  # several new positions after a cache need a batch of one
    expected = expected[: ids.size][None]
    first = served(adapter="cached", input_ids=ids[:, :5])
    cache = {
        output.replace("present", "past_key_values"): first[output]
        for output in served.output_names
        if output.startswith("present")
    }
    second = served(adapter="cached", input_ids=ids[:, 5:], attention_mask=np.ones_like(ids), **cache)
    both = torch.from_numpy(np.concatenate([first.logits, second.logits], axis=1))
    assert relative_error(both, expected) < 1e-4


def test_rows_of_a_packed_parameter_take_one_adapter(tmp_path: Path) -> None:
    """Attention over another sequence multiplies by parts of `in_proj_weight`; PEFT has no GraLoRA there."""
    torch.manual_seed(0)
    model = CrossAttention().eval()
    sample = {"x": torch.randn(2, 3, 32), "memory": torch.randn(2, 5, 32)}
    config = GraloraConfig(r=4, hybrid_r=2, target_modules=["attn", "out"], init_weights=False)
    adapted = rewrite(trace(model, sample), config)
    assert len(adapted.sites[0].calls) == 2
    report = export_onnx(adapted, tmp_path / "onnx", adapters="data")
    assert report.verification is not None
    assert report.verification.passed
    inputs = {"x": torch.randn(3, 6, 32), "memory": torch.randn(3, 4, 32)}
    served = load(tmp_path / "onnx")
    with torch.no_grad():
        assert relative_error(served(adapter="default", **inputs)[0], adapted(**inputs)) < 1e-4
        assert relative_error(served(**inputs)[0], model(**inputs)) < 1e-4
        assert relative_error(adapted(**inputs), model(**inputs)) > 1e-2


def test_an_adapter_of_a_layer_that_is_not_called_is_left_out(exports: Exports) -> None:
    inputs = exports.adapted("perceptron", 2).manifest.adapter_inputs
    assert inputs is not None
    assert [site.path for site in inputs.sites] == ["inner", "outer"]
    assert inputs.uncalled == ("spare",)
