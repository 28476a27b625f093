"""Exports of real architectures run on ONNX Runtime as in PyTorch, and a refused export leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, merge, rewrite, trace
from gralora_fx.errors import ExportError, TraceError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters import onnx_verify as verify_module
from gralora_fx.exporters.verify_report import VerifyReport

ALL_LINEAR = GraloraConfig(r=8, gralora_k=2, hybrid_r=2, alpha=8, target_modules="all-linear", init_weights=False)


def adapted(name: str) -> GraloraModel:
    return rewrite(fresh_trace(name), ALL_LINEAR)


@pytest.fixture(scope="module")
def bert() -> GraloraModel:
    return adapted("bert")


@pytest.fixture(scope="module")
def bert_export(bert: GraloraModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "onnx"
    export_onnx(bert, path)
    return path


def run(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path / "model.onnx"))
    names = [value.name for value in session.get_inputs()]
    return [torch.from_numpy(array) for array in session.run(None, {name: inputs[name].numpy() for name in names})]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "mixtral"])
def test_onnx_runtime_equals_the_adapted_model(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    report = export_onnx(model, tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.passed
    assert all(check.max_rel_error <= 1e-4 for check in report.verification.tensors)
    assert {"model.onnx", "model.onnx_data", "config.json", "gralora_export.json"} <= set(report.files)


@pytest.mark.parametrize(("batch", "length", "padding"), [(1, 1, "right"), (1, 30, "right"), (4, 8, "left")])
def test_axes_vary_in_the_export(bert: GraloraModel, bert_export: Path, batch: int, length: int, padding: str) -> None:
    inputs = text_batch(batch, length, padding)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad():
        expected = bert(**inputs).logits
    assert (run(bert_export, inputs)[0] - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


def test_names_are_those_of_the_ecosystem(bert_export: Path) -> None:
    graph = onnx.load(str(bert_export / "model.onnx"), load_external_data=False).graph
    inputs = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input
    }
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert inputs == {name: ["batch_size", "sequence_length"] for name in names}
    assert [value.name for value in graph.output] == ["logits"]
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch_size"


def test_bare_model_gives_last_hidden_state(tmp_path: Path) -> None:
    base = tiny_model("bert").bert
    report = export_onnx(trace(base), tmp_path / "onnx")
    assert report.verification is not None
    assert [check.name for check in report.verification.tensors] == ["last_hidden_state", "pooler_output"]


def test_export_has_the_operators_of_the_base_export(bert: GraloraModel, bert_export: Path, tmp_path: Path) -> None:
    export_onnx(bert.traced, tmp_path / "base", verify=False)
    operators = [
        [node.op_type for node in onnx.load(str(path / "model.onnx"), load_external_data=False).graph.node]
        for path in (tmp_path / "base", bert_export)
    ]
    assert operators[0] == operators[1]


def test_weights_are_stored_once(tmp_path: Path) -> None:
    model = tiny_model("gpt2")  # its head is tied to its embeddings
    export_onnx(trace(model), tmp_path / "onnx")
    unique = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "onnx" / "model.onnx_data").stat().st_size <= 1.05 * unique + 20_000


def test_manifest_tells_where_the_export_comes_from(bert: GraloraModel, bert_export: Path, tmp_path: Path) -> None:
    import hashlib

    manifest = json.loads((bert_export / "gralora_export.json").read_text())
    bert.save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert manifest["schema_version"] == 1
    assert manifest["task"] == "text-classification"
    assert manifest["precision"] == "fp32"
    assert manifest["adapters"]["default"]["sha256"] == digest
    assert manifest["adapters"]["default"]["config"]["peft_type"] == "GRALORA"
    assert [site["path"] for site in manifest["sites"]] == [site.path for site in bert.sites]
    assert manifest["verification"]["passed"] is True
    assert {"torch", "onnxruntime", "gralora-fx"} <= set(manifest["packages"])


def test_fingerprint_is_the_bases_whatever_the_adapter(bert: GraloraModel, bert_export: Path, tmp_path: Path) -> None:
    export_onnx(bert.traced, tmp_path / "base", verify=False)
    export_onnx(fresh_trace("bert", seed=1), tmp_path / "other", verify=False)
    prints = [
        json.loads((path / "gralora_export.json").read_text())["base_fingerprint"]
        for path in (bert_export, tmp_path / "base", tmp_path / "other")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_config_names_the_data_file_for_transformers_js(bert_export: Path) -> None:
    config = json.loads((bert_export / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": True}


def test_exporting_keeps_the_models_state(bert: GraloraModel, tmp_path: Path) -> None:
    bert.train()
    try:
        before = str(bert.graph_module.graph)
        export_onnx(bert, tmp_path / "onnx", verify=False)
        assert str(bert.graph_module.graph) == before
        assert bert.training
        assert bert.active_adapters == ["default"]
    finally:
        bert.eval()


@pytest.mark.quick
def test_plain_module_exports(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).eval()
    model = rewrite(
        trace(module, (torch.randn(1, 8),)), GraloraConfig(r=4, target_modules=["0", "3"], init_weights=False)
    )
    export_onnx(model, tmp_path / "onnx")
    x = torch.randn(5, 8)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert [value.name for value in session.get_outputs()] == ["output"]
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(run(tmp_path / "onnx", {"input": x})[0], expected, atol=1e-5)


def test_nothing_is_printed(bert: GraloraModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(bert, tmp_path / "onnx")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


# -- verification ---------------------------------------------------------------------------------------------------


def test_verification_takes_a_users_inputs(bert: GraloraModel, bert_export: Path) -> None:
    inputs = text_batch(2, 5)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    assert verify_onnx(bert_export, bert, inputs=inputs).cases[-1] == "given inputs"


def test_verification_refuses_a_model_of_another_shape(bert_export: Path) -> None:
    with pytest.raises(ExportError, match=r"the export takes .*token_type_ids"):
        verify_onnx(bert_export, fresh_trace("distilbert"))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_failed_verification_leaves_nothing(
    bert: GraloraModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "verify_onnx", lambda *_: VerifyReport(False, 1e-4, (), ()))
    with pytest.raises(ExportError, match="results differ from the model's"):
        export_onnx(bert, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_failed_export_leaves_an_earlier_one(
    bert: GraloraModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(bert, tmp_path / "onnx", verify=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "onnx").iterdir()}
    monkeypatch.setattr(verify_module, "verify_onnx", lambda *_: VerifyReport(False, 1e-4, (), ()))
    with pytest.raises(ExportError):
        export_onnx(bert, tmp_path / "onnx")
    assert {path.name: path.read_bytes() for path in (tmp_path / "onnx").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_earlier_export_is_replaced_whole(bert: GraloraModel, tmp_path: Path) -> None:
    export_onnx(bert, tmp_path / "onnx", verify=False)
    (tmp_path / "onnx" / "stale.bin").write_bytes(b"old")
    export_onnx(bert, tmp_path / "onnx", verify=False)
    assert not (tmp_path / "onnx" / "stale.bin").exists()


def test_a_directory_with_something_else_is_refused(bert: GraloraModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"is not empty and holds no gralora_export.json"):
        export_onnx(bert, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_refused(bert: GraloraModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="it is a file, not a directory"):
        export_onnx(bert, tmp_path / "file")


@pytest.mark.parametrize(("option", "value"), [("adapters", "swapped"), ("precision", "fp8"), ("logits", "first")])
def test_unknown_choices_are_refused(bert: GraloraModel, tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(ExportError, match=f"{option}='{value}' is not available; take"):
        export_onnx(bert, tmp_path / "onnx", **{option: value})


def test_an_untraced_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="trace it first"):
        export_onnx(tiny_model("bert"), tmp_path / "onnx")  # type: ignore[arg-type]


def test_weights_of_double_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"holds float64 weights; cast it to one of float32, float16, bfloat16"):
        export_onnx(fresh_trace("bert", dtype=torch.float64), tmp_path / "onnx")


def test_a_trace_without_example_inputs_is_refused(tmp_path: Path) -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ExportError, match="no example inputs"):
        export_onnx(trace(graph), tmp_path / "onnx")


def test_a_missing_tokenizer_is_refused(bert: GraloraModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="no tokenizer can be loaded"):
        export_onnx(bert, tmp_path / "onnx", tokenizer=tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_merged_model_exports_like_the_adapted_one(bert: GraloraModel, bert_export: Path, tmp_path: Path) -> None:
    merged: TracedModel = merge(bert)
    export_onnx(merged, tmp_path / "onnx", verify=False)
    assert (tmp_path / "onnx" / "model.onnx_data").read_bytes() == (bert_export / "model.onnx_data").read_bytes()


def test_the_current_directory_is_refused(bert: GraloraModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="is the current directory"):
        export_onnx(bert, ".")


def test_a_foreign_manifest_is_not_an_export(bert: GraloraModel, tmp_path: Path) -> None:
    (tmp_path / "gralora_export.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not an earlier export"):
        export_onnx(bert, tmp_path)
    with pytest.raises(ExportError, match="has no schema_version, so it is not the manifest of an export"):
        verify_onnx(tmp_path, bert)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("path", ["x" * 300, "a\0b"])
def test_an_unusable_path_is_named(bert: GraloraModel, path: str) -> None:
    with pytest.raises(ExportError, match="is not a usable path"):
        export_onnx(bert, path)


class Bessel(nn.Module):
    """A model with an operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i1(self.up(x))


def test_an_operator_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"no ONNX form of prims\.bessel_i1\.default at test_onnx\.py:\d+: compute it with other"
    ):
        export_onnx(trace(Bessel(), (torch.randn(2, 8),)), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


class Sorts(nn.Module):
    """A model whose forward depends on its values, so that it has no graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(x.sum() > 0) else x


def test_a_layer_that_has_no_graph_is_named() -> None:
    module = nn.Sequential(nn.Linear(8, 8), Sorts())
    with pytest.raises(TraceError, match=r"cannot trace Sequential at 1 \(test_onnx.py:\d+\): "):
        trace(module, (torch.randn(2, 8),))
