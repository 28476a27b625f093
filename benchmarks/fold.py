"""An adapter folded into an exported SmolLM2-135M: memory, and time beside a copy of its data and an export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, measure, progress, remove
from benchmarks.streaming import peak_memory
from gralora_fx.exporters import fold_onnx

RUNS = Path("runs/fold")
FOLD, COPY = "fold_onnx", "copy of the data file"


def run(iterations: int = 9) -> Report:
    """Compare a fold with a copy of the data file, `iterations` times, and its whole process with an export's."""
    report = Report("fold", "fold: SmolLM2-135M with a GraLoRA adapter on all seven projections, fp32")
    base = smollm2.base(RUNS / "base")
    adapter = smollm2.adapter(RUNS / "adapter", base)
    exported = RUNS / "exported"
    progress("fold, export of the base")
    export_seconds = _export(base, None, exported)
    _compare_with_copy(report, exported, adapter, iterations)
    progress("fold, whole processes")
    rows = [{"whole process": "export of base and adapter", "s": _export(base, adapter, RUNS / "merged")}]
    rows.append({"whole process": "export of the base", "s": export_seconds})
    measured = [_process(exported, adapter) for _ in range(3)]
    fold = sorted(measured, key=lambda entry: entry["process s"])[1]
    rows.append({"whole process": "fold", "s": fold["process s"]})
    report.tables.append(Table("from the command line, without verification", rows))
    memory = {"imports MB": fold["imports"] / 1e6, "peak MB": fold["peak"] / 1e6}
    report.tables.append(Table("memory of a process that folds", [memory]))
    extra = memory["peak MB"] - memory["imports MB"]
    report.claims += [
        Claim("memory of the fold beyond the imports, in MB", extra, at_most=64),
        Claim("export again / fold in a process that has imported", rows[0]["s"] / fold["fold s"], at_least=20),
    ]
    return report


def _compare_with_copy(report: Report, exported: Path, adapter: Path, iterations: int) -> None:
    data, copied, output = exported / "model.onnx_data", RUNS / "copied", RUNS / "folded"

    def fold() -> None:
        fold_onnx(exported, adapter, output)

    def clear(_: Any) -> None:
        for path in (output, copied):
            if path.exists():
                remove(path)

    cases = [
        Case(FOLD, lambda _: fold(), lambda: clear(None), clear),
        Case(COPY, lambda _: shutil.copyfile(data, copied), lambda: clear(None), clear),
    ]
    timings = measure(cases, iterations=iterations)
    sites = len(fold_onnx(exported, adapter, output).sites)
    clear(None)
    size = data.stat().st_size
    title = f"{sites} layers, {size / 1e6:.0f} MB, each file rewritten, digests computed"
    report.tables.append(Table(title, [timings.row(name, COPY) for name in (FOLD, COPY)]))
    report.claims.append(
        Claim("fold / copy of the data file, ratio of medians", timings.ratio(FOLD, COPY).of_medians, at_most=2.0)
    )


def _export(base: Path, adapter: Path | None, output: Path) -> float:
    """Return the seconds of an export from the command line."""
    shutil.rmtree(output, ignore_errors=True)
    command = ["export", "--model", base, "--task", "text-generation-with-past", "--output", output, "--no-verify"]
    command += [] if adapter is None else ["--adapter", adapter]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gralora_fx.cli", *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - begin


def _process(exported: Path, adapter: Path) -> dict[str, float]:
    """Measure a fold in its own process."""
    output = RUNS / "folded"
    code = "from benchmarks.fold import measured_fold; measured_fold()"
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported), str(adapter), str(output)],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begin
    shutil.rmtree(output)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"process s": seconds, **result}


def measured_fold() -> None:
    """Run a fold and print its seconds and peak memory in bytes; called in the other process."""
    import gralora_fx.exporters.onnx_fold  # noqa: F401  # before the first measurement

    imports, begin = peak_memory(), time.perf_counter()
    fold_onnx(*sys.argv[1:])
    print(json.dumps({"imports": imports, "fold s": time.perf_counter() - begin, "peak": peak_memory()}))
