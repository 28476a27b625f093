"""An export that generates, compared with onnxruntime-genai's own graph: export time, prefill, decode, and tokens.

SmolLM2-135M with a GraLoRA adapter on all seven projections; genai's builder and transformers' exporter start from the
checkpoint that PEFT merged. Exports are whole processes, one after the other; onnxruntime-genai runs both graphs, in
turns, in one process, on two threads, reloaded for every prompt. Both graphs read prompts in both ways: in pieces, as
`generate()` does, and at once, onnxruntime-genai's default.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import smollm2
from benchmarks.genai import build, open_model, run_process, seconds_of, token_times
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx.serving import load

RUNS = Path("runs/generation")
OURS, GENAI = "ours", "genai's builder"
CHUNK = 256  # tokens of a prompt that `generate()` reads in a step
PIECES, AT_ONCE = f"prompt in pieces of {CHUNK}", "prompt at once"
THREADS, CONTEXT, STEPS = 2, 1000, 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "To make bread you need",
    "def fibonacci(n):",
    "The three laws of robotics are",
)
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.exporters import OnnxConfig, OnnxExporter
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.randint(3, 1000, (2, 9))
with torch.no_grad():
    cache = model(ids[:, :6], past_key_values=DynamicCache(), use_cache=True).past_key_values
mask = torch.ones_like(ids)
mask[1, :2] = 0
inputs = {"input_ids": ids[:, 6:], "attention_mask": mask, "past_key_values": cache}
exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
exported.save_pretrained(sys.argv[2])
"""


def run(iterations: int = 8, exports: int = 2) -> Report:
    """Measure `exports` runs of each export, and tokens, prefill and decode of `iterations` prompts per graph."""
    report = Report("generation", "generation: SmolLM2-135M with GraLoRA on all seven projections")
    base = smollm2.base(RUNS / "base")
    adapter = smollm2.adapter(RUNS / "adapter", base)
    merged = smollm2.merged(RUNS / "merged", base, adapter)
    _compare_exports(report, base, adapter, merged, exports)
    _compare_depths(report, base, exports)
    _compare_tokens(report, base, adapter)
    for precision, bounds in (("fp32", (0.8, 1.0)), ("int4", (0.9, 1.0))):
        ours = _ours(base, adapter, RUNS / f"ours_{precision}", precision)
        theirs = build(merged, RUNS / f"genai_{precision}", precision, RUNS / "cache")
        _compare_speed(report, ours, theirs, precision, bounds, iterations)
    return report


def _ours(base: Path, adapter: Path | None, output: Path, precision: str = "fp32") -> Path:
    command = ["export", "--model", base, "--task", "text-generation-with-past", "--output", output, "--no-verify"]
    command += [] if adapter is None else ["--adapter", adapter]
    command += [] if precision == "fp32" else ["--quantize", precision]
    run_process(["-m", "gralora_fx.cli", *command], output)
    return output


def _compare_exports(report: Report, base: Path, adapter: Path, merged: Path, exports: int) -> None:
    sides = {
        "ours, base and adapter, fp32": lambda: _ours(base, adapter, RUNS / "ours_fp32"),
        "genai's builder, merged checkpoint, fp32": lambda: build(merged, RUNS / "genai_fp32", "fp32", RUNS / "cache"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(exports):
        for name, side in sides.items():
            progress(f"export {turn + 1} of {exports}, {name}")
            seconds[name].append(seconds_of(side))
    progress("export, transformers' OnnxExporter")
    output = RUNS / "transformers"
    theirs = seconds_of(lambda: run_process(["-c", TRANSFORMERS, merged, output], output))
    ours, builder = (statistics.median(times) for times in seconds.values())
    rows = [{"export, whole process": name, "seconds": statistics.median(times)} for name, times in seconds.items()]
    rows.append({"export, whole process": "transformers' OnnxExporter, merged checkpoint, fp32", "seconds": theirs})
    report.tables.append(Table("time to export", rows))
    report.claims.append(Claim("export over genai's builder", ours / builder, at_most=2.0))
    report.claims.append(Claim("export over transformers' exporter", ours / theirs, at_most=0.2))


def _compare_depths(report: Report, base: Path, exports: int) -> None:
    models = {layers: smollm2.random_of_depth(RUNS / f"random_{layers}", layers, base) for layers in (6, 12, 24)}
    seconds: dict[int, list[float]] = {layers: [] for layers in models}
    for turn in range(exports):
        for layers, model in models.items():
            progress(f"export {turn + 1} of {exports}, {layers} layers")
            seconds[layers].append(seconds_of(lambda model=model: _ours(model, None, RUNS / "ours_random")))
    medians = {layers: statistics.median(times) for layers, times in seconds.items()}
    rows = [{"layers": layers, "seconds, whole process": median} for layers, median in medians.items()]
    report.tables.append(Table("time to export by depth", rows))
    for more, fewer in ((12, 6), (24, 12)):
        growth = medians[more] / medians[fewer]
        report.claims.append(Claim(f"export of {more} layers over one of {fewer}", growth, at_most=2.0))


def _compare_tokens(report: Report, base: Path, adapter: Path) -> None:
    progress("greedy tokens beside PEFT's")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    served = load(RUNS / "ours_fp32")
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            expected = model.eval().generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answer = served.generate(ids["input_ids"][0].tolist(), max_new_tokens=64)
        same += _without_end(answer, tokenizer) == _without_end(expected.tolist(), tokenizer)
    report.claims.append(Claim(f"prompts of {len(PROMPTS)} with PEFT's 64 greedy tokens", float(same), at_least=5.0))


def _without_end(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """Drop the token that ends an answer, which only one side returns."""
    end = tokenizer.eos_token_id
    return list(tokens[: tokens.index(end)] if end in tokens else tokens)


def _compare_speed(
    report: Report, ours: Path, theirs: Path, precision: str, bounds: tuple[float, float], iterations: int
) -> None:
    runs = [(graph, way) for way in (PIECES, AT_ONCE) for graph in (OURS, GENAI)]
    prefill: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    decode: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    numbers = np.random.default_rng(0)
    for iteration in range(-1, iterations):
        progress(f"{precision}, prompt {iteration + 2} of {iterations + 1}")
        ids = numbers.integers(10, 40000, (1, CONTEXT)).astype(np.int32)
        turn = 1 if iteration % 2 else -1
        # reloaded, the other one first: a session's memory placement changes its decode by two percent
        opened = {name: open_model(directory, THREADS) for name, directory in [(OURS, ours), (GENAI, theirs)][::turn]}
        for graph, way in runs[::turn]:
            times = token_times(opened[graph], ids, STEPS, chunk=CHUNK if way == PIECES else 0)
            if iteration >= 0:
                prefill[graph, way].append(times[0])
                decode[graph, way].append(statistics.median(times[1:]))
        del opened
    rows: list[Mapping[str, Any]] = []
    for what, seconds in (("prefill", prefill), ("decode, a token", decode)):
        rows += [
            {"what": what, "graph": graph, "driven": way, "ms": 1e3 * statistics.median(t)}
            for (graph, way), t in seconds.items()
        ]
    for way in (PIECES, AT_ONCE):
        alike = Ratio.between(prefill[OURS, way], prefill[GENAI, way]).of_medians
        report.claims.append(Claim(f"{precision}, prefill over genai's graph, both: {way}", alike, at_most=1.0))
    usual = Ratio.between(prefill[OURS, PIECES], prefill[GENAI, AT_ONCE]).of_medians
    what = f"{precision}, prefill as generate() drives it over genai's graph as genai drives it"
    report.claims.append(Claim(what, usual, at_most=bounds[0]))
    step = Ratio.between(decode[OURS, PIECES], decode[GENAI, AT_ONCE]).of_medians
    report.claims.append(Claim(f"{precision}, decode over genai's graph", step, at_most=bounds[1]))
    report.tables.append(Table(f"{precision}: {CONTEXT} tokens, then {STEPS} more, {THREADS} threads", rows))
