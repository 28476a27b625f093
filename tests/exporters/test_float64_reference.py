"""The float64 reference: models that magnify float32's last bits are compared with it, wrong exports fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from traces import fresh

from gralora_fx import TracedModel, trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.verify.float64_model import Float64Model
from gralora_fx.exporters.verify.tolerances import ToleranceCheck


class Magnifier(nn.Module):
    """Shows the last bits of a product: angles of many turns."""

    def __init__(self, turns: float = 3000.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 8)
        self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.linear(x) * self.turns)


def traced(turns: float = 3000.0) -> TracedModel:
    return trace(Magnifier(turns), (torch.randn(2, 64, generator=torch.Generator().manual_seed(1)),))


def test_a_model_that_magnifies_its_last_bits_is_exported(tmp_path: Path) -> None:
    report = export_onnx(traced(), tmp_path / "onnx").verification
    assert report is not None
    assert report.passed
    assert report.max_abs_error > report.tolerance
    assert report.rounding
    for check in report.rounding:
        assert report.tolerance < check.difference <= 4 * check.rounding
        assert "float32 itself rounds" in str(check)
        assert str(check) in report.details


def test_a_tolerance_that_is_given_is_strict(tmp_path: Path) -> None:
    model = traced()
    export_onnx(model, tmp_path / "onnx")
    report = verify_onnx(tmp_path / "onnx", model, tolerance=1e-4)
    assert not report.passed
    assert not report.rounding


def test_another_model_is_not_excused(tmp_path: Path) -> None:
    model = traced()
    export_onnx(model, tmp_path / "onnx")
    with torch.no_grad():
        model.tree.parameters["linear.bias"].add_(1e-4)
    with pytest.raises(ExportError, match="another base"):
        verify_onnx(tmp_path / "onnx", model)


def judged(off: float, turns: float = 3000.0) -> tuple[bool, ToleranceCheck]:
    """Judge values that are off by a number; return whether they are accepted, and by which reference."""
    model = traced(turns).eval()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(x)
    tolerance_check = ToleranceCheck(model, 1e-4, use_float64=True)
    return tolerance_check.accepts("it", expected, expected + off, lambda m: m(x=x)), tolerance_check


@pytest.mark.parametrize(("off", "accepted"), [(1e-6, True), (3e-4, True), (0.05, False)])
def test_what_is_off_by_more_than_rounding_is_an_error(off: float, accepted: bool) -> None:
    is_accepted, tolerance_check = judged(off)
    assert is_accepted is accepted
    assert len(tolerance_check.exceeded) == (off > 1e-4)


def test_a_model_that_does_not_magnify_has_no_excuse() -> None:
    accepted, tolerance_check = judged(2e-4, turns=1.0)
    assert not accepted
    (check,) = tolerance_check.exceeded
    assert check.rounding < 1e-6


def test_after_one_fault_no_other_difference_is_looked_into() -> None:
    model = traced(turns=1.0).eval()
    tolerance_check = ToleranceCheck(model, 1e-4, use_float64=True)
    zero = torch.zeros(1)
    for _ in range(2):
        assert not tolerance_check.accepts("it", zero, zero + 1, lambda m: m(x=torch.ones(1, 64))[0, :1])
    assert tolerance_check.accepts("it", zero + 1, zero + 1.00001, lambda m: m(x=torch.ones(1, 64))[0, :1])
    assert len(tolerance_check.exceeded) == 1


def test_rounding_that_tells_nothing_excuses_nothing() -> None:
    accepted, _ = judged(1e-3, turns=1e9)
    assert not accepted


def test_without_float64_the_report_says_so() -> None:
    model = traced().eval()
    tolerance_check = ToleranceCheck(model, 1e-4, use_float64=True)

    def run(_: Float64Model) -> Tensor:
        raise NotImplementedError("no kernel for float64")

    assert not tolerance_check.accepts("it", torch.zeros(1), torch.ones(1), run)
    assert str(tolerance_check.exceeded[0]) == "it: 1.0e+00, no float64 run to compare with: no kernel for float64"


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
def test_a_run_in_float64_is_the_model_cast_to_float64(name: str) -> None:
    model, traced_model = fresh(name)
    inputs = {name: value for name, value in traced_model.example_inputs.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        expected = model.double()(**inputs)[0]
    actual = next(iter(Float64Model(traced_model)(**inputs).values()))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
