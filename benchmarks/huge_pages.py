"""A token of an export with memory in huge pages, as `serve` requests them, compared with small pages.

glibc reads this setting when a process starts, so each side is its own process; they decode in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx.cli.huge_pages import TUNABLE, VARIABLE
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

BASE, OUTPUT = Path("runs/generation/base"), Path("runs/huge_pages")
KINDS: dict[str, dict[str, Any]] = {"float32": {}, "int4": {"quantize": "int4"}}
SIDES = {"pages of 4 KiB": "0", "huge pages": "1"}
PAST, STEPS, CAPACITY, PAUSE = 128, 4, 4000, 0.02


def run(iterations: int = 60) -> Report:
    """Measure SmolLM2-135M's token, in float32 and int4."""
    report = Report("huge-pages", f"a token of SmolLM2-135M behind {PAST} others, in huge pages and without")
    smollm2.base(BASE)
    traced = load_traced(str(BASE), None, "text-generation-with-past")
    for kind, options in KINDS.items():
        progress(f"huge pages, {kind}")
        export_onnx(traced, OUTPUT / kind, verify=False, overwrite=True, **options)
        workers = {side: _worker(OUTPUT / kind, value) for side, value in SIDES.items()}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for iteration in range(-2, iterations):
            for side in list(SIDES)[:: 1 if iteration % 2 else -1]:
                time.sleep(PAUSE)  # until the threads of the other process have stopped spinning
                seconds = _asked(workers[side])
                times[side] += [seconds] if iteration >= 0 else []
        plain, huge = times.values()
        ratio = Ratio.between(huge, plain)
        rows = [{"memory": side, "ms": 1e3 * sorted(series)[len(series) // 2]} for side, series in times.items()]
        report.tables.append(Table(kind, rows))
        report.claims.append(Claim(f"{kind}: huge pages over plain ones", ratio.median_of_pairs, at_most=1.0))
        for worker in workers.values():
            worker.terminate()
            worker.wait()
    return report


def decode() -> None:
    """Decode some tokens for each line on stdin, and print the seconds per token; called in each process."""
    decoder = load(sys.argv[1]).decoder(rows=1, capacity=CAPACITY)
    row = decoder.open()
    decoder.step({row: list(range(10, 10 + PAST))})
    for _ in sys.stdin:
        begin = time.perf_counter()
        for _ in range(STEPS):
            decoder.step({row: [7]})
        print(json.dumps((time.perf_counter() - begin) / STEPS), flush=True)


def _worker(directory: Path, value: str) -> subprocess.Popen[str]:
    code = "from benchmarks.huge_pages import decode; decode()"
    command = [sys.executable, "-c", code, str(directory)]
    environment = os.environ | {VARIABLE: f"{TUNABLE}={value}"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _asked(worker: subprocess.Popen[str]) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(json.loads(worker.stdout.readline()))
