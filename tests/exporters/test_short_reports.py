"""Reports: three lines that say whether it passed, what was written and how to use it; the rest on request."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft_oracle import saved_by_peft
from running import run
from terminals import in_terminal, plain_lines
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from torch import nn
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.cli.wording import show
from gralora_fx.exporters import export_onnx, fold_onnx, merge_checkpoint, to_lora, verify_onnx
from gralora_fx.exporters.reports import AttentionReport, ExportReport
from gralora_fx.exporters.verify_report import RoundingCheck, TensorCheck, TokenCheck, VerifyReport
from gralora_fx.format.manifest import RowsEntry
from gralora_fx.format.quantized_weights import OutputQuality, Quality, TokenQuality

NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraloraModel, ExportReport]:
    """Return an export that takes three adapters as data, its model and its report."""
    folder = tmp_path_factory.mktemp("reports")
    traced = fresh_trace("llama", task="text-generation-with-past")
    model = rewrite(traced, GraloraConfig(r=4, target_modules=["q_proj"]), adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, GraloraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter(list(NAMES))
    for name in NAMES:
        for factors in model.adapter(name).factors.values():
            nn.init.normal_(factors.B, std=0.1)
    report = export_onnx(model, folder / "it's" / "onnx", adapters="data", tokenizer=tiny_tokenizer())
    return folder, model, report


def fast(report: ExportReport) -> ExportReport:
    """Return the same of a machine on which nothing took long."""
    return dataclasses.replace(report, seconds=dict.fromkeys(report.seconds, 0.1))


@pytest.mark.quick
def test_a_report_is_three_lines_and_the_last_can_be_pasted(exported: tuple[Path, GraloraModel, ExportReport]) -> None:
    folder, _, report = exported
    passed, size, use = str(fast(report)).splitlines()
    assert passed.startswith("passed: 3 inputs compared with PyTorch, largest difference ")
    assert passed.endswith("; 64 of 64 greedy tokens equal")
    place = folder / "it's" / "onnx"
    total = sum(report.files.values()) / 1000
    assert size == f"wrote {place}: {total:.1f} kB in {len(report.files)} files (every figure: print(report.details))"
    call = use.removeprefix("use it: ")
    assert "load(" in call
    assert "adapter='first'" in call
    with redirect_stdout(StringIO()) as printed:
        exec(call, {})
    assert printed.getvalue().endswith("\n")


def test_three_adapters_are_one_block(exported: tuple[Path, GraloraModel, ExportReport]) -> None:
    _, _, report = exported
    assert report.verification is not None
    lines = report.verification.details.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("logits"))
    assert [line.split()[:2] for line in lines[first + 1 : first + 4]] == [["with", f"'{name}'"] for name in NAMES]
    assert len([line for line in lines if line.startswith("output ")]) == 1
    assert len([line for line in lines if line.startswith("passed: ")]) == 1
    assert len(lines) < 30


def test_verification_names_its_adapters(exported: tuple[Path, GraloraModel, ExportReport]) -> None:
    _, model, report = exported
    lines = str(verify_onnx(report.output_dir, model, "quick")).splitlines()
    assert lines[1] == (
        "quick verification, compared with the PyTorch model, then with 'first', 'second', 'third', tolerance 0.0001"
    )
    assert lines[2] == "every figure: print(report.details)"


LONG = {"fold": 1.0, "convert": 20.0, "verify": 41.0, "write": 33.0}
PASSED = VerifyReport(True, 1e-4, ("one",), (TensorCheck("logits", 1e-6, 1e-6, 1.0),), level="full")


@pytest.mark.parametrize(
    ("level", "seconds", "line"),
    [
        ("full", LONG, "verification took 41 s of 95 s: verify='quick' compares less, verify=False nothing"),
        ("quick", LONG, "verification took 41 s of 95 s: verify=False leaves it out"),
        ("quick", {**LONG, "choose": 50.0}, "choosing bits took 50 s of 145 s: quantize='int8' chooses none"),
        ("quick", {**LONG, "write": 60.0}, "writing took 60 s of 122 s"),
    ],
)
def test_the_last_line_of_long_work_says_what_took_longest(level: str, seconds: dict[str, float], line: str) -> None:
    report = ExportReport(Path("onnx"), {}, seconds, dataclasses.replace(PASSED, level=level))
    assert str(report).splitlines()[-1] == report.details.splitlines()[-1] == line


def test_what_must_not_be_missed_is_counted_and_named() -> None:
    explained = RoundingCheck("1 x 1, logits", 2e-4, 1e-4)
    report = ExportReport(
        Path("onnx"),
        {},
        verification=dataclasses.replace(PASSED, rounding=(explained, explained)),
        attention=AttentionReport(1, {"layer.0": "its mask", "layer.1": "its mask"}),
        rows=RowsEntry(None, "of this test"),
    )
    assert str(report).splitlines()[-1] == (
        "note: 2 differences above 0.0001, which rounding explains; attention of 2 layers not fused; "
        "no model_rows.onnx: of this test"
    )
    assert all(reason in report.details for reason in ("layer.1: its mask", "of this test", str(explained)))
    without = str(dataclasses.replace(report, verification=None)).splitlines()[0]
    python = "from gralora_fx.exporters import verify_onnx; verify_onnx('onnx', model)"
    assert without == f"exported; not compared with PyTorch, to do so: {python}"


def test_a_failed_comparison_says_where_it_differs_most() -> None:
    checks = tuple(RoundingCheck(where, size, 1e-7) for where, size in (("1 x 1, logits", 0.1), ("3 x 9, logits", 0.3)))
    failed = dataclasses.replace(PASSED, passed=False, rounding=checks)
    both = PASSED.with_adapter("style", failed)
    worst = "2 of the compared values differ, most of all 3 x 9, logits: 3.0e-01, float32 itself rounds 1.0e-07"
    assert str(failed).splitlines()[0] == f"FAILED: {worst}"
    assert str(both).splitlines()[0] == f"FAILED: {worst} with 'style'"
    assert "FAILED with 'style': 1 case (" in both.details
    tokens = TokenCheck(("a prompt",), 4, 3, 0, "a prompt: row 0, token 2", (0.1,), passed=False)
    assert str(dataclasses.replace(PASSED, passed=False, tokens=tokens)).startswith(
        "FAILED: a prompt: row 0, token 2\n"
    )


def test_inputs_of_a_model_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    network = trace(nn.Linear(4, 2), (torch.randn(1, 4),))
    use = str(fast(export_onnx(network, tmp_path / "onnx"))).splitlines()[2]
    assert use == f"use it: from gralora_fx.serving import load; load('{tmp_path / 'onnx'}')(input=...)"


def test_what_changes_files_reports_three_lines(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    saved_by_peft("llama", tmp_path / "adapter", r=4, target_modules=["q_proj"])
    export_onnx(fresh_trace("llama"), tmp_path / "onnx", verify=False)
    folded = fold_onnx(tmp_path / "onnx", tmp_path / "adapter", tmp_path / "folded")
    merged = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    plain = to_lora(tmp_path / "adapter", tmp_path / "lora")
    for report in (dataclasses.replace(folded, seconds={}), merged, plain):
        result, size, use = str(report).splitlines()
        assert result.startswith(("folded 2 layers; not compared", "merged 2 weights; ", "exact: "))
        assert size.startswith(f"wrote {report.output_dir}: ")
        assert use.startswith("use it: from ")
        assert report.details.startswith(f"wrote {report.output_dir}\n")


def test_a_narrow_terminal_cuts_nothing_of_a_report(tmp_path: Path) -> None:
    saved_by_peft("llama", tmp_path / "adapter", r=4, target_modules=["q_proj"])
    given = ["to-lora", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora"), "-v"]
    shown = in_terminal([sys.executable, "-m", "gralora_fx.cli", *given], 60)
    assert "\n".join(plain_lines(shown)).strip() == run(*given, "--overwrite").stdout.strip().replace("\n\n", "\n")


def test_the_command_of_a_report_can_be_pasted(exported: tuple[Path, GraloraModel, ExportReport]) -> None:
    _, _, report = exported
    with redirect_stdout(StringIO()) as printed:
        show(fast(report), verbose=False)
    program, *arguments = shlex.split(printed.getvalue().splitlines()[2].removeprefix("use it: "))
    assert program == "gralora-fx"
    assert arguments[:3] == ["generate", "--onnx", str(report.output_dir)]
    assert run(*arguments).status == 0


def test_the_effect_of_few_bits_says_of_how_many_answers() -> None:
    def logits(share: float, rows: int) -> OutputQuality:
        return OutputQuality("logits", rows, share, 0.1, None, None)

    quality = Quality("200 given texts", (logits(1.0, 200), logits(0.995, 1200)))
    assert quality.outcome == "keeps 99.5 % of float32's 1,200 answers"
    tokens = Quality("2 texts", tokens=(TokenQuality(None, 2, 3456, 0.5, 0.01, 4, 2.0),))
    assert tokens.outcome == "keeps float32's next token at 50.0 % of 3,456 positions, KL divergence 0.0100"
