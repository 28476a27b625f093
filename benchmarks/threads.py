"""Generation by `serving.load` with its default number of threads, and with every number up to the machine's cores.

SmolLM2-135M in int4: a prompt of 256 random tokens and 32 more, through `generate`. All sides run in one process, in
turns.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import smollm2
from benchmarks.generation import RUNS
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.run.sessions.run_options import available_threads
from gralora_fx.serving import load

PROMPT, STEPS = 256, 32
DEFAULT = "default"


def run(iterations: int = 9) -> Report:
    """Measure generation by number of threads."""
    report = Report("threads", f"generation by threads: SmolLM2-135M, int4, {PROMPT} tokens and {STEPS} more")
    base = smollm2.base(RUNS / "base")
    with tempfile.TemporaryDirectory() as folder:
        progress("threads, export")
        traced = load_traced(str(base), None, "text-generation-with-past")
        export_onnx(traced, Path(folder) / "onnx", quantize="int4", verify=False)
        progress("threads, generation")
        counts = {f"{count} threads": count for count in range(1, (os.cpu_count() or 1) + 1)}
        models = {name: load(Path(folder) / "onnx", threads=count) for name, count in counts.items()}
        models[DEFAULT] = load(Path(folder) / "onnx")
        ids = np.random.default_rng(0).integers(10, 40_000, PROMPT).tolist()
        cases = [
            Case.of(name, lambda model=model: model.generate(ids, max_new_tokens=STEPS))  # type: ignore[misc]
            for name, model in models.items()
        ]
        timings = measure(cases, iterations=iterations)
    report.tables.append(Table("prompt and tokens", [timings.row(name, DEFAULT) for name in models]))
    best = timings.best(list(counts))
    ratio = timings.ratio(DEFAULT, best).median_of_pairs
    report.claims.append(Claim(f"default ({available_threads()} threads) over the best, {best}", ratio, at_most=1.05))
    return report
