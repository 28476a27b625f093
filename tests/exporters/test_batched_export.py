"""Exports whose rows have an adapter each, beside PEFT with that adapter and beside the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from peft_oracle import peft_model
from tiny_models import text_batch, tiny_model
from torch import nn
from traces import fresh_trace
from wrong_rows import ShiftedSteps

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.verify import adapters_as_data, comparable
from gralora_fx.exporters.verify.adapters_as_data import MixedRows
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.engine.adapters import Adapters, Stack
from gralora_fx.serving import load

CACHED = "text-generation-with-past"
CONFIGS = {
    "one": {"r": 4, "gralora_k": 2, "alpha": 8},
    "two": {"r": 8, "gralora_k": 2, "hybrid_r": 2, "alpha": 16},
}


def adapted(
    name: str, directory: Path, *, task: str | None = None, **overrides: Any
) -> tuple[GraloraModel, dict[str, Any]]:
    """Return a model of ours with two adapters that PEFT made, and PEFT's models by adapter; None for the base."""
    oracles: dict[str, Any] = {"None": tiny_model(name, **overrides)}
    model: GraloraModel | None = None
    for seed, (adapter, sizes) in enumerate(CONFIGS.items()):
        targets = "all-linear" if adapter == "two" else r".*(query|q_lin|q_proj|c_attn|dense|down_proj|fc1)"
        oracles[adapter] = peft_model(tiny_model(name, **overrides), seed + 1, target_modules=targets, **sizes)
        oracles[adapter].save_pretrained(str(directory / adapter))
        if model is None:
            traced = fresh_trace(name, task=task, **overrides)
            model = GraloraModel.from_pretrained(traced, directory / adapter, adapter_name=adapter)
        else:
            model.load_adapter(directory / adapter, adapter)
    assert model is not None
    model.set_adapter(list(CONFIGS))
    return model.eval(), oracles


def stack_of(path: Path) -> Stack:
    adapters = Adapters(path, read_manifest(path))
    return adapters.stack_of([adapters["two"], adapters["one"]])  # ids 1 and 2, not in the order of the export


def run_rows(path: Path, inputs: dict[str, torch.Tensor], ids: list[int]) -> list[np.ndarray[Any, Any]]:
    """Return a plain session on stacked tensors and ids."""
    session = onnxruntime.InferenceSession(str(path / "model_rows.onnx"))
    names = {value.name for value in session.get_inputs()}
    feed = {name: value.numpy() for name, value in inputs.items() if name in names}
    stack = stack_of(path)
    results: list[np.ndarray[Any, Any]] = session.run(
        None, {**feed, **stack.values, "adapter_ids": np.array(ids, dtype=np.int64)}
    )
    return results


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraloraModel, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bert")
    model, oracles = adapted("bert", folder)
    export_onnx(model, folder / "onnx", adapters="data")
    return folder / "onnx", model, oracles


@pytest.mark.parametrize("padding", ["right", "left"])
def test_rows_of_one_batch_are_pefts_with_their_adapter(
    bert: tuple[Path, GraloraModel, dict[str, Any]], padding: str
) -> None:
    path, _, oracles = bert
    inputs = text_batch(5, 9, padding)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    names = ["two", "None", "one", "two", "None"]
    (logits,) = run_rows(path, inputs, [{"None": 0, "two": 1, "one": 2}[name] for name in names])
    for row, name in enumerate(names):
        with torch.no_grad():
            expected = oracles[name](**{key: value[row : row + 1] for key, value in inputs.items()}).logits
        assert np.abs(logits[row] - expected[0].numpy()).max() <= 1e-4
    with torch.no_grad():  # the adapters do something
        assert (oracles["one"](**inputs).logits - oracles["two"](**inputs).logits).abs().max() > 1e-2


def test_rows_without_an_adapter_are_the_base_bit_for_bit(
    bert: tuple[Path, GraloraModel, dict[str, Any]], tmp_path: Path
) -> None:
    path, model, _ = bert
    with model.disable_adapter():
        export_onnx(model, tmp_path / "base", verify=False)
    inputs = text_batch(5, 9)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    (mixed,) = run_rows(path, inputs, [0, 1, 0, 2, 0])
    base = onnxruntime.InferenceSession(str(tmp_path / "base" / "model.onnx"))
    (expected,) = base.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert np.array_equal(mixed[::2], expected[::2])
    assert not np.array_equal(mixed[1], expected[1])


def test_names_and_shapes_are_the_contracts(bert: tuple[Path, GraloraModel, dict[str, Any]]) -> None:
    path, _, _ = bert
    session = onnxruntime.InferenceSession(str(path / "model_rows.onnx"))
    shapes = {value.name: value.shape for value in session.get_inputs()}
    query = "bert.encoder.layer.0.attention.self.query"
    assert shapes["adapter_ids"] == ["batch_size"]
    assert shapes[f"{query}.gralora_A"][:3] == ["adapters", 2, 16]
    assert shapes[f"{query}.gralora_B"][::3] == ["adapters", 16]
    assert shapes[f"{query}.gralora_A_general"][:2] == ["adapters", 32]
    assert shapes[f"{query}.gralora_B_general"][::2] == ["adapters", 32]
    manifest = read_manifest(path)
    assert manifest.adapters_mode == "data"
    assert manifest.rows is not None
    assert manifest.rows.file == "model_rows.onnx"


@pytest.mark.parametrize("name", ["vit", "distilbert", "roberta"])
def test_encoders_are_verified_with_every_adapter_in_one_batch(name: str, tmp_path: Path) -> None:
    model, _ = adapted(name, tmp_path)
    report = export_onnx(model, tmp_path / "onnx", adapters="data")
    assert report.verification is not None
    assert list(report.verification.adapters) == ["one", "two"]
    assert report.verification.max_abs_error <= 1e-4


def test_a_wrong_row_fails_verification(
    bert: tuple[Path, GraloraModel, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, _ = bert
    assert verify_onnx(path, model, "quick").passed

    class Shifted(MixedRows):
        def ids(self, rows: int) -> np.ndarray[Any, Any]:
            right = super().ids(rows)
            return np.where(np.arange(len(right)) == 2, (right + 1) % self.count, right)

    monkeypatch.setattr(adapters_as_data, "MixedRows", Shifted)
    assert not verify_onnx(path, model, "quick").passed


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_adapters_stay_float_over_quantized_bases(quantize: Any, tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path)
    report = export_onnx(model, tmp_path / "onnx", adapters="data", quantize=quantize, block_size=16)
    assert report.verification is not None
    assert report.verification.passed
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model_rows.onnx"))
    types = {value.type for value in session.get_inputs() if ".gralora_" in value.name}
    assert types == {"tensor(float)"}


@pytest.mark.parametrize(
    ("name", "logits"), [("llama", "all"), *((name, "last") for name in ("llama", "gpt2", "opt", "gemma3", "mixtral"))]
)
def test_decoders_are_verified_in_chunks_and_steps(name: str, logits: Any, tmp_path: Path) -> None:
    model, _ = adapted(name, tmp_path, task=CACHED)
    report = export_onnx(model, tmp_path / "onnx", adapters="data", logits=logits)
    verification = report.verification
    assert verification is not None
    assert verification.max_abs_error <= 1e-4
    for part in (verification, *verification.adapters.values()):
        for tokens in (part.tokens, part.rows):
            assert tokens is not None
            assert tokens.equal == tokens.compared > 0


def test_a_window_of_positions(tmp_path: Path) -> None:
    model, _ = adapted("mistral", tmp_path, task=CACHED, sliding_window=5)
    report = export_onnx(model, tmp_path / "onnx", adapters="data", verify="full")
    assert report.verification is not None
    assert report.verification.max_abs_error <= 1e-4


def test_a_wrong_row_of_a_decoder_fails_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted("llama", tmp_path, task=CACHED)
    monkeypatch.setattr(comparable, "RowSteps", ShiftedSteps)
    with pytest.raises(ExportError, match="results differ from the model's"):
        export_onnx(model, tmp_path / "onnx", adapters="data")


def test_a_decoder_in_half_precision(tmp_path: Path) -> None:
    model, _ = adapted("llama", tmp_path, task=CACHED)
    report = export_onnx(model, tmp_path / "onnx", adapters="data", precision="fp16", quantize="int4", block_size=16)
    assert report.verification is not None
    assert report.verification.passed


@pytest.mark.parametrize("mode", ["data", "inputs"])
@pytest.mark.parametrize(("name", "task"), [("bert", None), ("llama", CACHED)])
def test_ranks_may_differ_from_layer_to_layer(mode: Any, name: str, task: str | None, tmp_path: Path) -> None:
    """ONNX Runtime plans memory by the names of axes: one name for all ranks would make it fail."""
    few = GraloraConfig(r=2, gralora_k=2, hybrid_r=2, target_modules=r".*(key|k_proj|down_proj)", init_weights=False)
    model = rewrite(fresh_trace(name, task=task), few, adapter_name="few")
    model.add_adapter("all", GraloraConfig(r=16, gralora_k=2, target_modules="all-linear", init_weights=False))
    model.set_adapter(["few", "all"])
    report = export_onnx(model, tmp_path / "onnx", adapters=mode)
    assert report.verification is not None
    assert report.verification.max_abs_error <= 1e-4


class Tiled(nn.Module):
    """A layer that sees every row twice, all rows and then all again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.repeat(2, 1, 1)).unflatten(0, (2, -1)).sum(0)


class Turned(nn.Module):
    """A layer whose input has the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("module", [Tiled, Turned])
def test_layers_whose_input_is_not_made_of_rows_have_no_graph_of_rows(module: type[nn.Module], tmp_path: Path) -> None:
    traced = trace(module(), (torch.randn(2, 3, 8),))
    model = rewrite(traced, GraloraConfig(r=2, gralora_k=2, target_modules=["linear"], init_weights=False))
    report = export_onnx(model, tmp_path / "onnx", adapters="data")
    assert report.rows is not None
    reason = str(report.rows.reason)
    assert "no adapter can be chosen by row at linear: the first axis of its input [" in reason
    assert report.rows == read_manifest(tmp_path / "onnx").rows
    assert not (tmp_path / "onnx" / "model_rows.onnx").exists()
    with pytest.raises(ServingError, match=r"one adapter runs in a call \(no model_rows\.onnx: no adapter can be"):
        load(tmp_path / "onnx")(x=np.zeros((2, 3, 8), np.float32), adapter=["default", None])


def test_an_output_without_rows_has_no_graph_of_rows(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        """A layer whose outputs are those of each row, and their sum over the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.linear(x)
            return y, y.sum(0)

    config = GraloraConfig(r=2, gralora_k=2, target_modules=["linear"], init_weights=False)
    model = rewrite(trace(Pooled(), (torch.randn(2, 3, 8),)), config)
    report = export_onnx(model, tmp_path / "onnx", adapters="data")
    assert report.rows is not None
    assert "the first axis of the output output_1 is not the batch" in str(report.rows)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x / x.numel() ** 0.5, "of a row depends on the rows beside it"),
        (lambda x: x - x.mean(0), "of a row depends on the rows beside it"),
        (lambda x: x - x[1], "the model itself fails on 1 rows"),
    ],
    ids=["numel", "mean", "second"],
)
def test_a_row_that_depends_on_others_has_no_graph_of_rows(
    function: Callable[[torch.Tensor], torch.Tensor], reason: str, tmp_path: Path
) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(function(x))

    config = GraloraConfig(r=2, gralora_k=2, target_modules=["linear"], init_weights=False)
    model = rewrite(trace(Scaled(), (torch.randn(2, 3, 8),)), config)
    report = export_onnx(model, tmp_path / "onnx", adapters="data")
    assert reason in str(report.rows)


@pytest.mark.parametrize("kind", ["lora", "gralora"])
def test_a_vector_has_adapters_as_data(kind: str, tmp_path: Path) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    config = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    blocks = GraloraConfig(r=2, gralora_k=2, target_modules=["linear"], init_weights=False)
    model = rewrite(trace(Single(), (torch.randn(8),)), config if kind == "lora" else blocks)
    export_onnx(model, tmp_path / "onnx", adapters="data")
    x = torch.randn(8)
    found = load(tmp_path / "onnx")(x=x.numpy(), adapter="default")["output"]
    assert np.allclose(found, model(x).detach(), atol=1e-5)


def test_an_encoder_decoder_says_why_it_has_none(tmp_path: Path) -> None:
    traced = fresh_trace("t5", task="text2text-generation-with-past", num_layers=1)
    model = rewrite(traced, GraloraConfig(r=2, gralora_k=2, target_modules=["q"], init_weights=False))
    report = export_onnx(model, tmp_path / "onnx", adapters="data", verify=False)
    assert "no model_rows.onnx: rows of an encoder-decoder run one after the other" in report.details


@pytest.mark.parametrize("earlier", ["swappable", "batched"])
def test_earlier_names_mean_data(earlier: Any, tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path)
    export_onnx(model, tmp_path / "onnx", adapters=earlier, verify=False)
    manifest = read_manifest(tmp_path / "onnx")
    assert (manifest.adapters_mode, manifest.flavour) == ("data", "plain")
    path = tmp_path / "onnx" / "gralora_export.json"
    told = json.loads(path.read_text())
    told["adapters_mode"] = told["adapter_inputs"]["mode"] = earlier
    path.write_text(json.dumps(told))
    if earlier == "swappable":
        assert read_manifest(tmp_path / "onnx").adapters_mode == "data"
    else:
        with pytest.raises(ExportError, match=r"which adapters='data' replaces; export again with gralora-fx"):
            read_manifest(tmp_path / "onnx")
