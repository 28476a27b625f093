"""Decomposed attention on ONNX Runtime, compared with the reference that traces compute with."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from gralora_fx.core.tracing.trace import trace
from gralora_fx.exporters.rules.attention.decomposed_attention import decompose_attention, decompose_masks
from gralora_fx.exporters.translation.operators import DOMAIN
from gralora_fx.exporters.translation.translate import OPSET, translate

BATCH, LENGTH, TOTAL, SIZE = 3, 4, 9, 8


class Attention(nn.Module):
    """The operator itself, with its numbers fixed."""

    def __init__(self, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None) -> None:
        super().__init__()
        self.window, self.softcap, self.sinks = window, softcap, sinks

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        numbers = (0.3, self.window, self.softcap, 0.0)
        result: Tensor = torch.ops.gralora.attention(query, key, value, mask, self.sinks, *numbers)
        return result


def padding() -> Tensor:
    mask = torch.ones(BATCH, TOTAL, dtype=torch.long)
    mask[1, :2] = 0
    return mask


def inputs(heads: int, key_heads: int, value_size: int, mask: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(heads, LENGTH, SIZE), (key_heads, TOTAL, SIZE), (key_heads, TOTAL, value_size)]
    return *(torch.randn(BATCH, *shape) for shape in shapes), mask


def run(model: ir.Model, path: Path, values: tuple[Tensor, ...]) -> Tensor:
    ir.save(model, path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path / "model.onnx"))
    names = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
    return torch.from_numpy(result)


@pytest.mark.parametrize(("heads", "key_heads", "value_size"), [(4, 4, 8), (4, 2, 8), (4, 1, 5), (6, 6, 3)])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"sinks": True}], ids=str)
def test_it_computes_what_a_trace_does(
    tmp_path: Path, heads: int, key_heads: int, value_size: int, options: dict[str, float]
) -> None:
    torch.manual_seed(1)
    module = Attention(**{**options, **({"sinks": torch.randn(heads)} if "sinks" in options else {})})  # type: ignore[arg-type]
    values = inputs(heads, key_heads, value_size, padding())
    model = translate(trace(module, values, dynamic=False).graph_module)
    (node,) = (node for node in model.graph if node.domain == DOMAIN)
    decompose_attention(model.graph, node, {})
    model.graph.opset_imports[""] = OPSET
    model.graph.opset_imports.pop(DOMAIN)
    assert torch.allclose(run(model, tmp_path, values), module(*values), atol=1e-5)


@pytest.mark.parametrize("mask_heads", [1, 4])
def test_a_mask_of_a_models_own_is_added(tmp_path: Path, mask_heads: int) -> None:
    torch.manual_seed(2)
    module, bias = Attention(), torch.randn(BATCH, mask_heads, LENGTH, TOTAL)
    values = inputs(4, 2, SIZE, bias)
    model = translate(trace(module, values, dynamic=False).graph_module)
    (node,) = (node for node in model.graph if node.domain == DOMAIN)
    decompose_attention(model.graph, node, {})
    model.graph.opset_imports[""] = OPSET
    model.graph.opset_imports.pop(DOMAIN)
    actual = run(model, tmp_path, values)
    assert torch.allclose(actual, module(*values), atol=1e-5)
    assert not torch.allclose(actual, module(*values[:3], padding()), atol=1e-2)


def test_as_many_heads_as_a_text_has_tokens(tmp_path: Path) -> None:
    class OfOneSize(Attention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            query, key, value = (part.reshape(*part.shape[:3], SIZE) for part in (query, key, value))
            return super().forward(query, key, value, mask)

    module, zeros = OfOneSize(), torch.zeros(BATCH, 1, LENGTH, TOTAL)
    model = translate(trace(module, inputs(4, 4, SIZE, zeros)).graph_module)
    (node,) = (node for node in model.graph if node.domain == DOMAIN)
    assert not isinstance(node.inputs[0].shape[1], int)
    decompose_attention(model.graph, node, {})
    model.graph.opset_imports[""] = OPSET
    model.graph.opset_imports.pop(DOMAIN)
    values = inputs(7, 7, SIZE, zeros)
    assert torch.allclose(run(model, tmp_path, values), module(*values), atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_a_mask_that_a_model_reads_itself_is_made(tmp_path: Path, window: int) -> None:
    class Mask(nn.Module):
        def forward(self, mask: Tensor, x: Tensor) -> Tensor:
            additive: Tensor = torch.ops.gralora.mask(mask, x.shape[1], window, torch.float32)
            return additive + x.sum()

    values = (padding(), torch.zeros(BATCH, LENGTH))
    model = translate(trace(Mask(), values).graph_module)
    assert decompose_masks(model.graph) == 1
    model.graph.opset_imports[""] = OPSET
    model.graph.opset_imports.pop(DOMAIN)
    actual = run(model, tmp_path, values)
    assert actual.shape == (BATCH, 1, LENGTH, TOTAL)
    assert torch.equal(actual, Mask()(*values))
    assert (actual == 0).sum(-1).amax() == (window or TOTAL)
