"""The examples run as they are."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "4 of 14 sites adapted" in output
    assert "merged and unmerged differ by" in output


def test_peft_to_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["peft_to_onnx.py", "--output", str(tmp_path / "onnx")])
    runpy.run_path(str(EXAMPLES / "peft_to_onnx.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "passed: 4 cases" in output
    assert "ONNX Runtime and PyTorch differ by" in output


def test_several_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["several_adapters.py", "--picture", str(tmp_path / "model.html")])
    runpy.run_path(str(EXAMPLES / "several_adapters.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "formal, brief, mixed" in output
    assert "<svg" in (tmp_path / "model.html").read_text()


def test_two_adapters_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["two_adapters_one_base.py", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "two_adapters_one_base.py"), run_name="__main__")
    output = capsys.readouterr().out
    differences = re.findall(r"(formal|brief): ONNX Runtime and PEFT differ by (\S+) of the largest logit", output)
    assert [name for name, _ in differences] == ["formal", "brief", "formal"]
    assert all(float(difference) < 1e-4 for _, difference in differences)
    assert "loaded: brief, formal" in output
