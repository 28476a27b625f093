"""Experts in exports: one operator a layer or a loop, every kind of gate, blocks of every kind, any router."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from damaged_exports import forget_marks
from same_rows import same_rows
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

from gralora_fx import trace
from gralora_fx.base.compat.torch_graphs import schema_of
from gralora_fx.base.features import features as all_features
from gralora_fx.exporters import export_onnx
from gralora_fx.features.experts import loop
from gralora_fx.features.experts.blocks import expert_weights
from gralora_fx.features.experts.gate import ACTIVATIONS, GATE_NOTE, HALVES, INTERLEAVED, NO_GATE, ExpertGate
from gralora_fx.features.experts.lowering import moe_attributes
from gralora_fx.features.experts.operators import Experts
from gralora_fx.features.experts.rows import arranged, as_modelled
from gralora_fx.format.export_directory import CPU_FUNCTION
from gralora_fx.run.sessions import session as opening
from gralora_fx.run.sessions.cpu_functions import call_cpu_functions
from gralora_fx.run.sessions.session import open_session

SILU = ExpertGate("silu", HALVES)
BOUNDED = ExpertGate("silu", INTERLEAVED, alpha=1.702, offset=1.0, limit=0.5)  # as gpt-oss has, whose limit is 7
GATES = {
    "silu of a half": SILU,
    "bounded silu of neighbours": BOUNDED,
    "relu of a half": ExpertGate("relu", HALVES),
    "squared relu": ExpertGate("relu2", NO_GATE),
    "gelu": ExpertGate("gelu_tanh", NO_GATE),
}
IN_A_LOOP = {
    "gelu of a half": (ExpertGate("gelu", HALVES), "no gelu of a gate"),
    "gelu of neighbours within bounds": (
        ExpertGate("gelu_tanh", INTERLEAVED, offset=1.0, limit=0.5),
        "no gelu_tanh of",
    ),
    "gelu without a gate": (ExpertGate("gelu", NO_GATE), "no gelu,"),
}


class Mixture(nn.Module):
    """A layer of four experts, of which each token has two, with weights of both signs."""

    def __init__(
        self, gate: ExpertGate, *, has_bias: bool = False, is_transposed: bool = False, size: int = 32
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        width, outputs = 48, 48 if gate.layout == NO_GATE else 96
        self.gate, self.is_transposed = gate, is_transposed
        self.router = nn.Linear(size, 4)
        shapes = [(4, outputs, size), (4, size, width)]
        up, down = (torch.randn(shape) * 0.3 for shape in shapes)
        self.up = nn.Parameter(up.transpose(1, 2).contiguous() if is_transposed else up)
        self.down = nn.Parameter(down.transpose(1, 2).contiguous() if is_transposed else down)
        self.up_bias = nn.Parameter(torch.randn(4, outputs)) if has_bias else None
        self.down_bias = nn.Parameter(torch.randn(4, size)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        scores, index = self.router(x).topk(2)
        options = {"is_transposed": self.is_transposed, **dataclasses.asdict(self.gate)}
        biases = {"up_bias": self.up_bias, "down_bias": self.down_bias}
        return Experts.compute(hidden=x, index=index, weights=scores, up=self.up, down=self.down, **biases, **options)


def exported(model: nn.Module, directory: Path, **options: Any) -> tuple[Any, list[str]]:
    """Return the report of a verified export, and its operators."""
    size = model.router.in_features
    report = export_onnx(trace(model.eval(), (torch.randn(7, size),)), directory, **options)
    return report, [node.op_type for node in ir.load(directory / "model.onnx").graph.all_nodes()]


def _routed(kind: type[nn.Module]) -> nn.Module:
    """Return a layer of experts of a class, and a router that gives each token two of them."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = MixtralConfig(hidden_size=32, intermediate_size=32, num_local_experts=4)
            config._experts_implementation = "grouped_mm"
            self.router, self.experts = nn.Linear(32, 4), kind(config)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=0.3)

        def forward(self, x: Tensor) -> Tensor:
            scores, index = self.router(x).topk(2)
            return self.experts(x, index, scores)

    return Layer()


@pytest.mark.parametrize("name", GATES)
def test_each_gate_is_one_operator_whatever_the_layout(tmp_path: Path, name: str) -> None:
    is_other = GATES[name].layout == INTERLEAVED
    report, operators = exported(Mixture(GATES[name], has_bias=is_other, is_transposed=is_other), tmp_path / "onnx")
    assert (operators.count("MoE"), "Loop" in operators) == (1, False)
    assert (report.experts.fused, report.experts.plain) == (1, {})
    assert report.verification.tensors[0].max_abs_error < 1e-4
    path, x = tmp_path / "onnx" / "model.onnx", np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    opened, operator = open_session(path.parent), onnxruntime.InferenceSession(path)
    together = opened.run(None, {"x": x})[0]
    np.testing.assert_allclose(together, operator.run(None, {"x": x})[0], rtol=1e-5, atol=2e-5)
    alone = np.concatenate([opened.run(None, {"x": row[None]})[0] for row in x])
    assert np.array_equal(together, alone)  # the operator multiplies a row alone in another order


def test_experts_in_float32_have_a_function_for_the_cpu_which_layers_of_one_form_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(module: nn.Module, **options: Any) -> tuple[list[str], int]:
        """Return the operators of experts once the export is opened, and the number of its functions."""
        report = export_onnx(
            trace(module.eval(), (torch.randn(7, 32),)), tmp_path / "onnx", overwrite=True, verify=False, **options
        )
        model = onnx.load(report.output_dir / "model.onnx", load_external_data=False)
        before = model.SerializeToString(deterministic=True)
        assert call_cpu_functions(model) == (model.SerializeToString(deterministic=True) != before)
        names = [node.op_type for node in model.graph.node]
        return [name for name in names if name.partition("_")[0] in ("MoE", "QMoE", "Experts")], len(model.functions)

    pair = nn.Sequential(Mixture(SILU), Mixture(SILU), Mixture(SILU, has_bias=True))
    assert opened(pair) == (["Experts_0", "Experts_0", "Experts_1"], 2)
    assert opened(Mixture(SILU), quantize="int8") == (["QMoE"], 0)
    assert opened(Mixture(SILU), precision="fp16") == (["MoE"], 0)
    size = 4 * 4 * 3 * 48 * 32
    monkeypatch.setattr(loop, "MOST_BYTES", size)
    assert opened(Mixture(SILU)) == (["Experts_0"], 1)
    monkeypatch.setattr(loop, "MOST_BYTES", size - 1)
    assert opened(Mixture(SILU)) == (["MoE"], 0)


def test_an_export_without_a_function_for_the_cpu_runs_its_operator(tmp_path: Path) -> None:
    exported(Mixture(SILU), tmp_path / "onnx", verify=False)
    path, x = tmp_path / "onnx" / "model.onnx", np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    operator = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    forget_marks(path.parent, CPU_FUNCTION)
    assert not call_cpu_functions(onnx.load(path, load_external_data=False))
    assert np.array_equal(open_session(path.parent).run(None, {"x": x})[0], operator)


def test_verification_compares_the_file_as_other_programs_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[onnx.ModelProto] = []
    monkeypatch.setattr(opening, "_call_functions", changed.append)
    report, operators = exported(Mixture(SILU), tmp_path / "onnx")
    assert report.verification.passed
    assert "MoE" in operators
    assert not changed
    open_session(tmp_path / "onnx")
    assert changed


@pytest.mark.parametrize("name", IN_A_LOOP)
def test_what_the_operator_does_not_compute_is_a_loop_with_the_reason(tmp_path: Path, name: str) -> None:
    gate, why = IN_A_LOOP[name]
    report, operators = exported(Mixture(gate, has_bias=True, is_transposed=True), tmp_path / "onnx", quantize="int8")
    assert operators.count("Loop") == 1
    assert report.experts.fused == 0
    (reason,) = report.experts.plain.values()
    assert reason.startswith(f"ONNX Runtime's operator has {why}")
    assert reason.endswith("its experts are computed in a loop, in floats")
    assert f"  {next(iter(report.experts.plain))}: {reason}" in report.details


def test_an_activation_is_one_line_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the folder's page adds one: a trace recognises the model's code, and the export computes it."""

    def cubed(at: Any, gate: ExpertGate, x: Any) -> Any:
        return at.multiply(at.relu(x), ACTIVATIONS["relu2"](at, gate, x))

    class Cubed(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return gate.relu() ** 3 * up

    monkeypatch.setitem(ACTIVATIONS, "relu3", cubed)
    report, operators = exported(_routed(Cubed), tmp_path / "onnx")
    assert operators.count("Loop") == 1
    assert next(iter(report.experts.plain.values())).startswith("ONNX Runtime's operator has no relu3 of a gate")
    assert report.verification.passed


@pytest.mark.parametrize("quantize", ["int4", "int8", "int8-dynamic"])
@pytest.mark.parametrize("name", ["silu of a half", "bounded silu of neighbours", "squared relu"])
def test_blocks_are_verified_and_rows_do_not_depend_on_each_other(tmp_path: Path, name: str, quantize: str) -> None:
    is_other = GATES[name].layout == INTERLEAVED
    model = Mixture(GATES[name], has_bias=is_other, is_transposed=is_other)
    report, operators = exported(model, tmp_path / "onnx", quantize=quantize)
    assert operators.count("QMoE") == 1
    assert report.verification.passed
    assert report.quantization.values == 4 * 32 + sum(
        weight.in_features * weight.out_features
        for weight in expert_weights(ir.load(tmp_path / "onnx" / "model.onnx").graph).values()
    )
    session, x = open_session(tmp_path / "onnx"), np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    together = session.run(None, {"x": x})[0]
    alone = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    assert same_rows(together, alone, quantize=quantize)


def test_the_size_of_blocks_divides_both_widths_or_experts_stay_float_by_name(tmp_path: Path) -> None:
    report, operators = exported(Mixture(SILU), tmp_path / "small", quantize="int8")  # widths of 32 and 48
    assert report.quantization.layers["up"].form == "int8 in blocks of 16"
    report, operators = exported(Mixture(SILU, size=40), tmp_path / "none", quantize="int8")
    assert operators.count("MoE") == 1
    assert {name: report.quantization.layers[name].form for name in ("up", "down")} == {
        "up": "float",
        "down": "float",
    }
    assert any(
        "no size of blocks divides their widths" in skip.reason for entry in report.passes for skip in entry.skipped
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_holds(tmp_path: Path, precision: str) -> None:
    report, operators = exported(Mixture(BOUNDED, has_bias=True), tmp_path / "onnx", precision=precision)
    assert operators.count("MoE") == 1
    assert report.verification.passed


@pytest.mark.quick
@pytest.mark.parametrize("gate", [SILU, BOUNDED, ExpertGate("relu2", NO_GATE), ExpertGate("silu", NO_GATE)], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_up", [False, True])
def test_the_models_order_of_rows_comes_back(gate: ExpertGate, is_transposed: bool, is_up: bool) -> None:
    matrix = np.random.default_rng(0).normal(size=(8, 6))
    stored = arranged(matrix, gate, is_up=is_up, is_transposed=is_transposed)
    assert np.array_equal(as_modelled(stored, gate, is_up=is_up, is_transposed=is_transposed), matrix)


@pytest.mark.quick
def test_the_record_knows_what_graphs_show() -> None:
    assert {GATE_NOTE, schema_of(Experts.target).name} <= next(
        each.signs for each in all_features() if each.name == "experts"
    )


@pytest.mark.quick
def test_every_activation_has_a_form_or_a_reason() -> None:
    forms = {
        (name, layout): moe_attributes(ExpertGate(name, layout)) for name in ACTIVATIONS for layout in (HALVES, NO_GATE)
    }
    fused = {key for key, form in forms.items() if isinstance(form, dict)}
    ungated = {(name, NO_GATE) for name in ("silu", "gelu_tanh", "relu", "relu2", "identity")}
    assert fused == {("silu", HALVES), ("relu", HALVES), *ungated}
    assert all("ONNX Runtime's operator has no" in form for form in forms.values() if isinstance(form, str))


@pytest.mark.parametrize("activation", ["silu", "gelu"])  # one operator, and a loop
def test_a_router_with_a_capacity_drops_tokens(tmp_path: Path, activation: str) -> None:
    """The experts of transformers take their number for none, which the samples of a trace need not have."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = MixtralConfig(hidden_size=32, intermediate_size=32, num_local_experts=4, hidden_act=activation)
            config._experts_implementation = "eager"
            self.router, self.experts = nn.Linear(32, 4), MixtralExperts(config)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

        def forward(self, x: Tensor) -> Tensor:
            weights, index = self.router(x).softmax(-1).topk(1)
            chosen = nn.functional.one_hot(index[:, 0], 4)
            place = (chosen.cumsum(0) * chosen).sum(-1, keepdim=True)
            return self.experts(x, torch.where(place > 3, 4, index), weights)

    torch.manual_seed(0)
    model = Layer().eval()
    traced = trace(model, (torch.randn(7, 32),))
    export_onnx(traced, tmp_path / "onnx")
    x = torch.randn(1, 32).repeat(5, 1)
    with torch.no_grad():
        expected = model(x)
        assert expected[3:].abs().max() == 0 < expected[:3].abs().min()
        torch.testing.assert_close(traced.graph_module(x), expected)
    for session in (open_session(tmp_path / "onnx"), onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")):
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)


def test_experts_without_the_operator_are_named(tmp_path: Path) -> None:
    class Cubed(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return gate**3 * up

    report, operators = exported(_routed(Cubed), tmp_path / "onnx")
    assert "MoE" not in operators
    assert list(report.experts.plain) == ["experts"]
    assert "experts: 0 layers with one operator each, 1 without\n  experts: no operator computes" in report.details
