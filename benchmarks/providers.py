"""MiniLM on ONNX Runtime's CPU provider and on OpenVINO's plug-in, in float32 and with a bfloat16 hint.

The same export runs on every side, in one process and in turns, with the same number of threads. The gain of bfloat16
    depends on the processor: AMX (`amx_bf16`) multiplies matrices in tiles, `avx512_bf16` alone in vectors. OpenVINO's
    plug-in needs an Intel processor; without a device, the report says so and measures the CPU provider.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Case, Claim, Report, Table, Timings, measure, progress
from benchmarks.models import minilm
from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import OrtModel, load

BATCH, LENGTH, THREADS = 16, 128, 2
CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"
BASE, BF16 = "CPU provider, fp32", "OpenVINO, bf16"
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: (CPU, {}),
    "OpenVINO, fp32": (OPENVINO, {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}}),
    BF16: (OPENVINO, {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}}),
}
FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
LARGEST = 0.25  # of the CPU provider's time, for bfloat16 with AMX

Feed = Mapping[str, NDArray[np.int64]]


def run(iterations: int = 15) -> Report:
    """Measure MiniLM at 16 x 128 tokens on every provider."""
    report = Report("providers", f"providers: MiniLM, {BATCH} x {LENGTH} tokens, {THREADS} threads")
    flags = cpu_flags()
    report.notes.append(f"processor: {', '.join(flags) or 'none of ' + ', '.join(FLAGS)}")
    progress("providers, export")
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(trace(minilm(), task="feature-extraction"), Path(folder) / "onnx")
        progress("providers, MiniLM")
        models, missing = open_sides(Path(folder) / "onnx")
        table, timings = providers_table(models, random_feed(), iterations=iterations)
    report.tables.append(table)
    report.notes += missing
    if BF16 in models and "amx_bf16" in flags:
        ratio = timings.ratio(BF16, BASE).median_of_pairs
        report.claims.append(Claim(f"{BF16} / {BASE}, median of pairwise ratios", ratio, at_most=LARGEST))
    else:
        report.notes.append(f"no claim: at most {LARGEST} of the CPU provider's time is for OpenVINO with amx_bf16")
    return report


def open_sides(directory: Path) -> tuple[dict[str, OrtModel], list[str]]:
    """Return an export opened on every side, and why it could not be opened on the others."""
    models: dict[str, OrtModel] = {}
    missing = []
    for name, (provider, options) in SIDES.items():
        try:
            models[name] = load(directory, (provider, options), threads=THREADS)
        except ServingError as error:
            missing.append(f"{name}: {error}")
    return models, missing


def random_feed() -> Feed:
    """Return ids, mask and types of `[batch, length]`, without padding."""
    ids = np.random.default_rng(0).integers(1000, 20_000, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def providers_table(models: Mapping[str, OrtModel], feed: Feed, *, iterations: int) -> tuple[Table, Timings]:
    """Time every side in turns; return a row for each.

    It has times, the ratio to the CPU provider `BASE`, the largest difference of the output relative to its largest
    value, and the number of nodes that the provider runs.
    """
    cases = [Case.of(name, lambda model=model: model(**feed)) for name, model in models.items()]
    timings = measure(cases, iterations=iterations, warmup=3)
    expected = models[BASE](**feed)[0]
    rows = []
    for name, model in models.items():
        difference = np.abs(model(**feed)[0] - expected).max() / np.abs(expected).max()
        placement = model.placement or {}
        nodes = {provider: sum(operators.values()) for provider, operators in placement.items()}
        texts = [f"{provider.removesuffix('ExecutionProvider')} {count}" for provider, count in nodes.items()]
        rows.append(timings.row(name, BASE) | {"difference": f"{difference:.1e}", "nodes": ", ".join(texts) or "all"})
    return Table(f"MiniLM, {BATCH} x {LENGTH} tokens", rows), timings


def cpu_flags() -> list[str]:
    """Return the processor's relevant instruction sets; none if the system does not list them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    known = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in FLAGS if flag in known]
