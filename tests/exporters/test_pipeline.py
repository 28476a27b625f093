"""Pipelines of an export: every pass is named, checked and counted, and its graph written where that is asked for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import fx, nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.core.graph.pipeline import PassLog, PassResult, Pipeline, Skip, name_of
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.formats import Columns
from gralora_fx.exporters.kinds.conversion import Conversion, conversion_of
from gralora_fx.exporters.kinds.decoder import attention_pipeline, decoder_pipeline
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantize.plan import QuantizationPlan
from gralora_fx.exporters.rules.attention.rotary import RotaryTables
from gralora_fx.exporters.rules.onnx_pipeline import DUMP, OnnxPipeline, export_log, import_domains
from gralora_fx.exporters.rules.products.float_matrices import fold_transposes, merge_matmuls
from gralora_fx.exporters.rules.products.quantize_weights import QuantizeWeights
from gralora_fx.exporters.rules.rows.graph_ends import keep_last_position

CACHED = "text-generation-with-past"


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().exp()


def graph() -> fx.Graph:
    return fx.symbolic_trace(Net()).graph


def do_nothing(graph: fx.Graph) -> PassResult[fx.Graph]:
    return PassResult(0)


@dataclass(frozen=True)
class SkipAll:
    """A pass with an option."""

    reason: str

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        return PassResult(0, tuple(Skip(node.name, self.reason) for node in graph.nodes if node.op == "call_method"))


def copied(graph: fx.Graph) -> PassResult[fx.Graph]:
    other = fx.Graph()
    other.output(other.graph_copy(graph, {}))
    return PassResult(1, graph=other)


def fail(graph: fx.Graph) -> PassResult[fx.Graph]:
    raise KeyError("missing")


def turn_round(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Leave a node before what it reads."""
    x, _, exp, _ = graph.nodes
    x.append(exp)
    return PassResult(1)


def test_passes_run_in_order_and_are_counted_with_what_they_skipped() -> None:
    log, before = PassLog(), graph()
    after = Pipeline("some", (do_nothing, copied, SkipAll("it is not worth it"))).run(before, log)
    assert after is not before
    assert [(report.pipeline, report.name, report.changed) for report in log.reports] == [
        ("some", "do_nothing", 0),
        ("some", "copied", 1),
        ("some", "skip_all", 0),
    ]
    assert log.reports[2].skipped == (("relu", "it is not worth it"), ("exp", "it is not worth it"))
    assert log.reports[2].to_dict()["skipped"][0] == {"place": "relu", "reason": "it is not worth it"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (fail, "the pass fail of some failed: 'missing'"),
        (turn_round, "the pass turn_round of some left a graph that does not lint: exp reads relu"),
    ],
)
def test_a_pass_that_goes_wrong_is_named(broken: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Pipeline("some", (do_nothing, broken, copied), error=ExportError).run(graph(), PassLog())


def onnx_model(*domains: str) -> ir.Model:
    value, nodes = ir.Value(name="x"), []
    previous = value
    for domain in domains:
        nodes.append(ir.Node(domain, "Identity", [previous]))
        previous = nodes[-1].outputs[0]
    return ir.Model(ir.Graph([value], [previous], nodes=nodes, opset_imports={"": 23, "gone": 1}), ir_version=11)


def test_a_model_imports_the_domains_of_its_operators_alone() -> None:
    model = onnx_model("", "com.microsoft")
    import_domains(model)
    assert dict(model.graph.opset_imports) == {"": 23, "com.microsoft": 1}


def test_a_node_of_a_model_before_what_it_reads_is_found() -> None:
    def reverse(model: ir.Model) -> PassResult[ir.Model]:
        first, second = model.graph
        model.graph.insert_before(first, ir.Node("", "Neg", [second.outputs[0]]))
        return PassResult(1)

    with pytest.raises(ExportError, match="the pass reverse of some left a graph that does not lint"):
        OnnxPipeline("some", (reverse,)).run(onnx_model("", ""), PassLog())


def test_graphs_are_written_after_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pipeline("some", (do_nothing, copied)).run(graph(), export_log(tmp_path / "given"))
    assert [path.name for path in sorted((tmp_path / "given").iterdir())] == [
        "01-some-do_nothing.txt",
        "02-some-copied.txt",
    ]
    assert "relu" in (tmp_path / "given" / "02-some-copied.txt").read_text()
    assert export_log(None).dump is None
    monkeypatch.setenv(DUMP, str(tmp_path / "environment"))
    assert export_log(None).dump == tmp_path / "environment"
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="graphs cannot be written to"):
        export_log(tmp_path / "file" / "dump")


def test_report_and_manifest_of_a_decoder_say_what_every_pass_did(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("gpt2", task=CACHED), GraloraConfig(r=4, target_modules=["c_attn"], init_weights=False))
    report = export_onnx(model, tmp_path / "onnx", verify=False, dump=tmp_path / "dump")
    by_name = {(entry.pipeline, entry.name): entry for entry in report.passes}
    assert by_name["decoder", "fuse_attention"].changed == 2
    assert by_name["graph-fx", "simplify"].changed > 0
    assert by_name["decoder", "fuse_attention"].skipped == ()
    manifest = json.loads((tmp_path / "onnx" / "gralora_export.json").read_text())
    assert manifest["passes"] == [entry.to_dict() for entry in report.passes]
    dumped = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert len(dumped) == len(report.passes)
    assert dumped[0] == "01-graph-fx-functionalize.txt"
    assert "GroupQueryAttention" in next((tmp_path / "dump").glob("*-decoder-fuse_attention.txt")).read_text()


def test_a_layer_that_is_not_fused_is_among_the_skipped(tmp_path: Path) -> None:
    model = fresh_trace("llama", task=CACHED, hidden_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=12)
    report = export_onnx(model, tmp_path / "onnx", verify=False)
    (fused,) = [entry for entry in report.passes if entry.name == "fuse_attention"]
    assert fused.changed == 0
    assert {skip.place for skip in fused.skipped} == {f"model.layers.{index}.self_attn" for index in range(2)}
    assert report.attention is not None
    assert report.attention.plain == {skip.place: skip.reason for skip in fused.skipped}


def test_a_model_without_a_cache_and_an_encoder_decoder_have_pipelines_too(tmp_path: Path) -> None:
    plain = export_onnx(trace(Net(), (torch.randn(2, 3),)), tmp_path / "plain", verify=False)
    assert {entry.pipeline for entry in plain.passes} == {"graph-fx", "plain"}
    pair = export_onnx(
        fresh_trace("t5", task="text2text-generation-with-past", num_layers=1), tmp_path / "pair", verify=False
    )
    assert {entry.pipeline for entry in pair.passes} == {"encoder-fx", "encoder", "decoder-fx", "decoder"}


@pytest.mark.parametrize(("name", "task"), [("bert", None), ("gpt2", CACHED), ("t5", "text2text-generation-with-past")])
def test_an_export_names_no_path_of_the_machine_that_made_it(name: str, task: str | None, tmp_path: Path) -> None:
    export_onnx(fresh_trace(name, task=task), tmp_path / "onnx", verify=False)
    for file in (tmp_path / "onnx").glob("*.onnx"):
        assert str(Path(torch.__file__).parent.parent).encode() not in file.read_bytes()
        assert str(Path(__file__).parent.parent.parent).encode() not in file.read_bytes()


def test_a_pipeline_reads_as_the_list_of_its_passes() -> None:
    tables = RotaryTables(onnx_model("").graph)
    traced = fresh_trace("gpt2", task=CACHED)
    plain = Conversion(traced, traced, ExportOptions(), PassLog())
    quantized = conversion_of(traced, ExportOptions(quantize="int4", verify=False))
    fused = [name_of(entry) for entry in attention_pipeline(plain, tables).passes]
    last = [name_of(entry) for entry in decoder_pipeline(plain, "", [keep_last_position]).passes]
    every = [name_of(entry) for entry in decoder_pipeline(plain, "", []).passes]
    small = [name_of(entry) for entry in decoder_pipeline(quantized, "", []).passes]
    assert fused[:3] == ["fold_transposes", "fuse_attention", "lower_rotary"]
    assert last == ["keep_last_position", *every]
    assert small == [*every, "quantize_weights"]


def test_an_order_that_breaks_what_a_pass_needs_is_refused() -> None:
    why = (
        "the pass merge_matmuls of some needs 'constant matrices are of floats', which the pass quantize_weights "
        "ends; change their order"
    )
    with pytest.raises(ValueError, match=re.escape(why)):
        OnnxPipeline("some", (fold_transposes, QuantizeWeights(QuantizationPlan(Columns())), merge_matmuls))
