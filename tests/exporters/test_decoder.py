"""Passes over a translated decoder, on small literal graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from gralora_fx import trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters.rules.products.float_matrices import fold_transposes
from gralora_fx.exporters.translation.translate import translate


def run(model: ir.Model, path: Path, *inputs: Tensor) -> tuple[Tensor, Counter[str]]:
    """Run a model in ONNX Runtime; return its outputs and the operators that it runs."""
    ir.save(model, path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), options)
    names = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return torch.from_numpy(result), Counter(node.op_type for node in ir.load(path / "optimized.onnx").graph)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.up(self.table(ids)), self.table.weight)


def test_weights_are_stored_as_they_are_used_and_tied_ones_once(tmp_path: Path) -> None:
    source, ids = Tied(), torch.tensor([[1, 2, 9]])
    model = translate(trace(source, (ids,)).graph_module)
    fold_transposes(model)
    shapes = {name: list(value.shape or ()) for name, value in model.graph.initializers.items() if "weight" in name}
    assert shapes == {"table.weight": [10, 8], "up.weight": [8, 8]}
    assert sum(node.op_type == "Transpose" for node in model.graph) == 1
    actual, _ = run(model, tmp_path, ids)
    assert torch.allclose(actual, source(ids), atol=1e-5)
    stored = model.graph.initializers["up.weight"].const_value
    assert stored is not None
    assert torch.equal(torch.from_numpy(stored.numpy()), source.up.weight.detach().T)


class Looked(nn.Module):
    """A table that is looked up by an index, which torch's translation puts behind a transposition of no axes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def test_a_table_that_is_looked_up_is_stored_as_it_is(tmp_path: Path) -> None:
    source, ids = Looked(), torch.tensor([[1, 2, 9]])
    model = translate(trace(source, (ids,)).graph_module)
    fold_transposes(model)
    assert torch.equal(run(model, tmp_path, ids)[0], source(ids))


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y + 1
        y.div_(4)
        return y + z


def test_what_writes_in_place_is_translated_by_its_result(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    actual, _ = run(translate(trace(Writes(), (x,)).graph_module), tmp_path, x)
    assert torch.allclose(actual, Writes()(x), atol=1e-6)


def test_an_operator_without_an_onnx_form_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i1(x)

    with pytest.raises(ExportError, match=r"no ONNX form of prims\.bessel_i1\.default at test_decoder\.py:\d+"):
        translate(trace(Odd(), (torch.randn(2, 3),)).graph_module)
