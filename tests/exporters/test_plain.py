"""Models without a cache: one translation for traces, symbolic graphs and graphs of fixed sizes, and its operators."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import Tensor, fx, nn
from traces import fresh_trace
from transformers import DebertaV2Config, DebertaV2Model, ResNetConfig, ResNetForImageClassification

from gralora_fx import GraloraModel, LoraConfig, merge, rewrite, trace
from gralora_fx.core.tracing import ready_graphs
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters import onnx as onnx_module
from gralora_fx.serving import load


def operators(path: Path) -> Counter[str]:
    graph = onnx.load(str(path / "model.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def passed(model: Any, inputs: Any, path: Path) -> Counter[str]:
    report = export_onnx(trace(model, inputs), path)
    assert report.verification is not None
    assert report.verification.passed
    return operators(path)


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, lambda x: self.left(x), lambda x: self.right(x) * 2, (x,))
        return chosen


class Norms(nn.Module):
    """Batch normalisation with and without weights, and with the moments of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)
        self.norms = nn.Sequential(
            nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, track_running_stats=False)
        )
        for norm in self.norms[:2]:
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norms(self.conv(x))
        return normalised


def test_a_trace_is_captured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = fresh_trace("distilbert")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("the graph is traced again"))
    export_onnx(traced, tmp_path / "onnx", verify=False)


def test_attention_is_one_operator(tmp_path: Path) -> None:
    export_onnx(fresh_trace("bert"), tmp_path / "onnx", verify=False)
    counted = operators(tmp_path / "onnx")
    layers = 2
    assert (counted["MultiHeadAttention"], counted["Softmax"], counted["MatMul"]) == (layers, 0, layers * 6)
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(counted) - known == {"MultiHeadAttention"}  # the one operator of ONNX Runtime's own


@pytest.mark.filterwarnings("ignore:Norms was traced in evaluation mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_normalisation_is_one_operator(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    traced = trace(Norms().eval(), (torch.randn(2, 4, 9),))
    precision: Any = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    report = export_onnx(traced, tmp_path / "onnx", precision=precision)
    assert report.verification is not None
    assert report.verification.passed
    assert operators(tmp_path / "onnx")["BatchNormalization"] == 2


def test_a_convolutional_net_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    assert passed(ResNetForImageClassification(config).eval(), None, tmp_path / "onnx")["BatchNormalization"] > 0


class Counts(nn.Module):
    """Counts of the numbers in each part of a range: whole numbers as experts have, and others, NaN among them."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.histc((x * 4).round().clamp(0, 7), bins=8, min=0, max=7)
        return whole + torch.histc(x.log(), bins=8, min=-1, max=1)


def test_numbers_are_counted_by_their_part_of_a_range(tmp_path: Path) -> None:
    found = passed(Counts(), (torch.randn(3, 40),), tmp_path / "onnx")
    assert found["IsNaN"] == 0


def test_copies_that_views_need_are_not_missed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = DebertaV2Config(**sizes, vocab_size=101, relative_attention=True, pos_att_type=["p2c", "c2p"])
    assert passed(DebertaV2Model(config).eval(), None, tmp_path / "onnx")


class Cells(nn.Module):
    """The least value of each cell, as TAPAS pools its tables; transformers rewrites the operator for ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        values = self.up(x).reshape(-1)
        cells = torch.arange(values.shape[0]) % 4
        return torch.zeros(4).scatter_reduce(0, cells, values, "amin", include_self=False)


def test_operators_that_a_rewrite_adds_have_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert passed(Cells(), (torch.randn(3, 6),), tmp_path / "onnx")


# -- graphs that are captured again -----------------------------------------------------------------------------------


def test_branches_of_a_condition_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Choice(), torch.randn(3, 8)
    assert passed(module, (x,), tmp_path / "onnx")["If"] == 1
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    for value in (x.abs(), -x.abs()):
        expected = module.left(value) if value.sum() > 0 else module.right(value) * 2
        assert torch.allclose(torch.from_numpy(session.run(None, {"x": value.numpy()})[0]), expected, atol=1e-5)


def test_modules_and_methods_of_a_symbolic_graph_export(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.up = nn.GELU(), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.up(x)).view(-1, 2, 3).transpose(1, 2).contiguous() + torch.relu(x.sum())

    torch.manual_seed(0)
    passed(fx.symbolic_trace(Head()), {"x": torch.randn(4, 8)}, tmp_path / "onnx")
    model = onnx.load(str(tmp_path / "onnx" / "model.onnx"), load_external_data=False)
    assert {"up.weight", "up.bias"} <= {value.name for value in model.graph.initializer}


def test_a_program_for_one_size_is_exported_and_verified_for_that_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4), nn.GELU())
    report = export_onnx(trace(torch.export.export(module, (torch.randn(3, 8),))), tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.passed
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (value,) = session.get_inputs()
    assert value.shape == [3, 8]


@pytest.mark.parametrize("axes", [{}, {0: torch.export.Dim.AUTO}], ids=["one size", "any batch"])
def test_a_program_of_texts_is_verified_for_the_sizes_that_it_holds_for(axes: dict[int, Any], tmp_path: Path) -> None:
    model = tiny_model("bert")
    inputs = {name: value for name, value in text_batch(2, 7).items() if name != "token_type_ids"}
    shapes = dict.fromkeys(inputs, axes)
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes if axes else None)
    report = export_onnx(trace(program), tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.passed


def test_a_node_that_a_users_pass_adds_is_captured(tmp_path: Path) -> None:
    def double(graph_module: fx.GraphModule) -> None:
        output = graph_module.graph.output_node()
        (result,) = output.all_input_nodes
        with graph_module.graph.inserting_before(output):
            doubled = graph_module.graph.call_function(torch.mul, (result, 2.0))
        output.replace_input_with(result, doubled)

    torch.manual_seed(0)
    traced = trace(nn.Sequential(nn.Linear(8, 4)), (torch.randn(3, 8),)).with_pass(double)
    report = export_onnx(traced, tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.passed


def test_what_cannot_be_captured_again_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    traced = trace(fx.symbolic_trace(nn.Sequential(nn.Linear(8, 4), nn.GELU())), {"input": torch.randn(3, 8)})
    monkeypatch.setattr(ready_graphs.torch.export, "export", fails)
    with pytest.raises(onnx_module.ExportError, match=r"cannot be captured as PyTorch's operators: .*no such kernel"):
        export_onnx(traced, tmp_path / "onnx")


class Keywords(nn.Module):
    """Layers and a parameter that are called as Python's keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"in": nn.Linear(8, 8), "class": nn.BatchNorm1d(5), "def": nn.Linear(8, 8)})
        self.register_parameter("lambda", nn.Parameter(torch.randn(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.parts["class"](torch.relu(self.parts["in"](x)))
        result: Tensor = self.parts["def"](h @ getattr(self, "lambda"))
        return result


def test_layers_that_are_called_as_keywords_are_layers_as_others(tmp_path: Path) -> None:
    model, x = Keywords().eval(), torch.randn(2, 5, 8)
    adapted = rewrite(trace(model, (x,)), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert set(adapted.adapter("default").planned) == {"parts.in", "parts.def"}
    adapted.train()
    adapted(x).sum().backward()
    expected = adapted.eval()(x).detach()
    torch.save(adapted, tmp_path / "model.pt")
    adapted.save_pretrained(tmp_path / "adapter")
    read = GraloraModel.from_pretrained(trace(model, (x,)), tmp_path / "adapter")
    for other in (copy.deepcopy(adapted), merge(adapted), torch.load(tmp_path / "model.pt", weights_only=False), read):
        torch.testing.assert_close(other.eval()(x), expected)
    for form, options in (("merged", {}), ("data", {"adapter": "default"})):
        export_onnx(adapted, tmp_path / form, adapters=form)
        found = load(tmp_path / form)(x=x.numpy(), **options)["output"]
        torch.testing.assert_close(torch.tensor(found), expected)
