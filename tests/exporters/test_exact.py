"""What float32 itself rounds: models that magnify their last bits are held against float64, wrong exports are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from traces import fresh

from gralora_fx import TracedModel, trace
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.verification.float64_reference import InFloat64, Judge


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
        assert str(check) in str(report)


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


def judged(off: float, turns: float = 3000.0) -> tuple[bool, Judge]:
    """Whether values that are off by a number are accepted, and who said so."""
    model = traced(turns).eval()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(x)
    judge = Judge(model, 1e-4, exact=True)
    return judge.accepts("it", expected, expected + off, lambda m: m(x=x)), judge


@pytest.mark.parametrize(("off", "accepted"), [(1e-6, True), (3e-4, True), (0.05, False)])
def test_what_is_off_by_more_than_rounding_is_a_fault(off: float, accepted: bool) -> None:
    found, judge = judged(off)
    assert found is accepted
    assert len(judge.found) == (off > 1e-4)


def test_a_model_that_does_not_magnify_has_no_excuse() -> None:
    accepted, judge = judged(2e-4, turns=1.0)
    assert not accepted
    (check,) = judge.found
    assert check.rounding < 1e-6


def test_after_one_fault_no_other_difference_is_looked_into() -> None:
    model = traced(turns=1.0).eval()
    judge = Judge(model, 1e-4, exact=True)
    zero = torch.zeros(1)
    for _ in range(2):
        assert not judge.accepts("it", zero, zero + 1, lambda m: m(x=torch.ones(1, 64))[0, :1])
    assert judge.accepts("it", zero, zero + 1e-5, lambda m: m(x=torch.ones(1, 64))[0, :1])
    assert len(judge.found) == 1


def test_rounding_that_tells_nothing_excuses_nothing() -> None:
    accepted, _ = judged(1e-3, turns=1e9)
    assert not accepted


def test_without_float64_the_report_says_so() -> None:
    model = traced().eval()
    judge = Judge(model, 1e-4, exact=True)

    def run(_: InFloat64) -> Tensor:
        raise NotImplementedError("no kernel for float64")

    assert not judge.accepts("it", torch.zeros(1), torch.ones(1), run)
    assert str(judge.found[0]) == "it: 1.0e+00, no run in float64 to tell what rounding does: no kernel for float64"


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
def test_a_run_in_float64_is_the_model_cast_to_float64(name: str) -> None:
    model, traced_model = fresh(name)
    inputs = {name: value for name, value in traced_model.example_inputs.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        expected = model.double()(**inputs)[0]
    found = next(iter(InFloat64(traced_model)(**inputs).values()))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
