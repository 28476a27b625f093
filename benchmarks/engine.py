"""One stream: this engine compared with onnxruntime-genai on the same directory.

SmolLM2-135M with a GraLoRA adapter folded in, float32 and int4, on two threads. Both read a prompt in pieces of one
length and decode greedily; both are reloaded for every prompt, in turns, in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import smollm2
from benchmarks.genai import open_model, seconds_of, token_times
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx.serving import load

RUNS = Path("runs/generation")
OURS, GENAI = "this engine", "onnxruntime-genai"
THREADS, CONTEXT, STEPS, CHUNK = 2, 1000, 32, 256


def run(iterations: int = 8) -> Report:
    """Measure `iterations` prompts on each side, and each token after them."""
    report = Report("engine", "engine: SmolLM2-135M, one stream, the same directory")
    for precision, directory in smollm2.exports(RUNS):
        _compare(report, directory, precision, iterations)
    return report


def _compare(report: Report, directory: Path, precision: str, iterations: int) -> None:
    prompts: dict[str, list[float]] = {OURS: [], GENAI: []}
    tokens: dict[str, list[float]] = {OURS: [], GENAI: []}
    numbers = np.random.default_rng(0)
    for iteration in range(-1, iterations):
        progress(f"{precision}, prompt {iteration + 2} of {iterations + 1}")
        ids = numbers.integers(10, 40000, (1, CONTEXT)).astype(np.int32)
        for name in (OURS, GENAI)[:: 1 if iteration % 2 else -1]:
            times = _ours(directory, ids) if name == OURS else _genai(directory, ids)
            if iteration >= 0:
                prompts[name].append(times[0])
                tokens[name].append(statistics.median(times[1:]))
    rows: list[Mapping[str, Any]] = [
        {"what": what, "engine": name, "ms": 1e3 * statistics.median(times[name])}
        for what, times in (("prompt", prompts), ("a token", tokens))
        for name in (OURS, GENAI)
    ]
    report.tables.append(Table(f"{precision}: {CONTEXT} tokens in pieces of {CHUNK}, then {STEPS}", rows))
    for what, times, most in (("prompt", prompts, 0.85), ("a token", tokens, 1.0)):
        ratio = Ratio.between(times[OURS], times[GENAI]).of_medians
        report.claims.append(Claim(f"{precision}, {what} over onnxruntime-genai", ratio, at_most=most))


def _ours(directory: Path, ids: np.ndarray[Any, Any]) -> list[float]:
    """Return the seconds of the prompt, then of each token."""
    decoder = load(directory, threads=THREADS).decoder(rows=1, capacity=CONTEXT + STEPS + 1, chunk=CHUNK)
    row = decoder.open()
    prompt = ids[0].tolist()
    parts = [prompt[start : start + CHUNK] for start in range(0, CONTEXT, CHUNK)]
    token = 0

    def read(tokens: list[int]) -> None:
        nonlocal token
        token = int(decoder.step({row: tokens})[row].argmax())

    def whole() -> None:
        for part in parts:
            read(part)

    return [seconds_of(whole), *(seconds_of(lambda: read([token])) for _ in range(STEPS))]


def _genai(directory: Path, ids: np.ndarray[Any, Any]) -> list[float]:
    return token_times(open_model(directory, THREADS), ids, STEPS, chunk=CHUNK)
