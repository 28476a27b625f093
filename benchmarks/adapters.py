"""Adapters as data: their cost per decoded token, and the cost of a switch.

SmolLM2-135M with a GraLoRA adapter on all seven projections: the export with the adapter folded in, the base's, and
those with adapters as data in both forms, run by onnxruntime-genai in turns in one process, and those of the default
forms by the engine, in the graph of rows. onnxruntime-genai's own export of a LoRA adapter is compared with its base.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.forms import BLOCKS, LORA, in_form
from benchmarks.genai import build, open_model, run_process, seconds_of, token_times
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.run.sessions.session import yielding_options
from gralora_fx.serving import load

RUNS = Path("runs/adapters")
SHARED = Path("runs/generation")
THREADS, CONTEXT, STEPS = 2, 50, 32
TASK = ("--task", "text-generation-with-past", "--no-verify")
Side = tuple[Any, tuple[Any, str] | None]  # a model of onnxruntime-genai, and its active adapter


def run(iterations: int = 6) -> Report:
    """Measure decoding, over `iterations` prompts per graph, and switching."""
    report = Report("adapters", "adapters as data: SmolLM2-135M, seven projections")
    base = smollm2.base(SHARED / "base")
    adapters = {32: smollm2.adapter(SHARED / "adapter", base), 8: smollm2.adapter(RUNS / "adapter_8", base, r=8)}
    for precision, rank, form, over_merged in (
        ("fp32", 32, BLOCKS, 1.2),
        ("fp32", 32, LORA, None),
        ("fp32", 8, LORA, None),
        ("int4", 8, LORA, 1.3),
        ("int4", 8, BLOCKS, None),
    ):
        _compare_decode(report, base, adapters[rank], (precision, rank, form), over_merged, iterations)
        if over_merged is not None:
            _compare_engine(report, f"{precision}, r={rank}, {form}", _exports_of(precision, rank, form), iterations)
    _compare_genai(report, base, iterations)
    _compare_switches(report, RUNS / f"data_fp32_r32_{BLOCKS}")
    return report


def _export(base: Path, adapter: Path | None, name: str, precision: str, *options: str) -> Path:
    output = RUNS / name
    if not (output / "model.onnx").is_file():
        progress(f"export {name}")
        command = ["export", "--model", base, "--output", output, *TASK, *options]
        command += [] if adapter is None else ["--adapter", adapter]
        command += [] if precision == "fp32" else ["--quantize", precision]
        run_process(["-m", "gralora_fx.cli", *command], output)
    return output


def _export_data(base: Path, adapter: Path, name: str, precision: str, form: str) -> Path:
    """Return an export with the adapter as data, in a given form instead of the rule's choice."""
    output = RUNS / name
    if not (output / "model.onnx").is_file():
        progress(f"export {name}")
        model = load_traced(str(base), str(adapter), TASK[1])
        quantize: Any = None if precision == "fp32" else precision
        with in_form(form):
            export_onnx(model, output, adapters="data", quantize=quantize, verify=False, overwrite=True)
    return output


def _compare_decode(
    report: Report, base: Path, adapter: Path, kind: tuple[str, int, str], over_merged: float | None, iterations: int
) -> None:
    precision, rank, form = kind
    name = f"{precision}, r={rank}, {form}"
    exported = _export_data(base, adapter, f"data_{precision}_r{rank}_{form}", precision, form)
    merged = _export(base, adapter, f"merged_{precision}_r{rank}", precision)
    plain = _export(base, None, f"base_{precision}", precision)
    model = open_model(exported, THREADS)
    active = og.Adapters(model)
    active.load(str(exported / "adapters" / "default.onnx_adapter"), "default")
    sides: dict[str, Side] = {
        "merged": (open_model(merged, THREADS), None),
        "base": (open_model(plain, THREADS), None),
        "data, adapter on": (model, (active, "default")),
        "data, none on": (model, None),
    }
    times = _interleaved(sides, name, iterations)
    on, off = (times[f"data, {state} on"] / times[other] for state, other in (("adapter", "merged"), ("none", "base")))
    report.claims.append(Claim(f"{name}: decode with the adapter over merged", on, at_most=over_merged))
    report.claims.append(Claim(f"{name}: decode with none over the base", off, at_most=1.05))
    nodes = _nodes(exported) - _nodes(plain)
    values = (exported / "adapters" / "default.onnx_adapter").stat().st_size
    floor = {"nodes added, inlined": nodes, "MB of adapter": values / 1e6}
    rows = [{"graph": side, "ms a token": 1e3 * seconds, **floor} for side, seconds in times.items()]
    report.tables.append(Table(f"decode, {name}, {THREADS} threads", rows))


def _exports_of(precision: str, rank: int, form: str) -> dict[str, Path]:
    names = {"merged": f"merged_{precision}_r{rank}", "base": f"base_{precision}"}
    return {side: RUNS / name for side, name in (names | {"data": f"data_{precision}_r{rank}_{form}"}).items()}


def _compare_engine(report: Report, name: str, exports: Mapping[str, Path], iterations: int) -> None:
    """Measure a token of one stream in the engine."""
    progress(f"the engine, {name}")
    adapters = {"merged": None, "base": None, "data, adapter on": "default", "data, none on": None}
    cases = [Case.of(side, _Stream(exports[side.partition(",")[0]], own)) for side, own in adapters.items()]
    times = measure(cases, iterations=10 * iterations)
    rows = [times.row(side, "merged") for side in adapters]
    report.tables.append(Table(f"four tokens of the engine, {name}, {THREADS} threads", rows))
    for side, other in (("data, adapter on", "merged"), ("data, none on", "base")):
        ratio = times.ratio(side, other).median_of_pairs
        report.claims.append(Claim(f"{name}: a token of the engine, {side}, over {other}", ratio))


class _Stream:
    """A row that decodes; a call reads four tokens, one after the other."""

    def __init__(self, directory: Path, adapter: str | None) -> None:
        # threads stop when a step ends, else those of one session would take the cores from the next
        decoder = load(directory, session_options=yielding_options(THREADS)).decoder(rows=1, capacity=2000, chunk=64)
        self._decoder, self._row = decoder, decoder.open(adapter=adapter)
        decoder.step({self._row: np.random.default_rng(0).integers(10, 40000, CONTEXT).tolist()})

    def __call__(self) -> None:
        for _ in range(4):
            self._decoder.step({self._row: [7]})


def _interleaved(sides: Mapping[str, Side], name: str, iterations: int) -> dict[str, float]:
    """Return the median seconds per token by side."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    numbers = np.random.default_rng(0)
    for iteration in range(-1, iterations):
        progress(f"{name}, prompt {iteration + 2} of {iterations + 1}")
        ids = numbers.integers(10, 40000, (1, CONTEXT)).astype(np.int32)
        for side, (model, adapter) in list(sides.items())[:: 1 if iteration % 2 else -1]:
            _, *tokens = token_times(model, ids, STEPS, adapter=adapter)
            if iteration >= 0:
                seconds[side].append(statistics.median(tokens))
    return {side: statistics.median(found) for side, found in seconds.items()}


def _nodes(directory: Path) -> int:
    """Count the nodes of a graph after inlining its functions."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    bodies = {function.name: len(function.node) for function in model.functions}
    return sum(bodies.get(node.op_type, 1) for node in model.graph.node)


def _compare_genai(report: Report, base: Path, iterations: int) -> None:
    """Compare onnxruntime-genai's own rank-8 LoRA over int4 with its base; there the adapter is part of the graph."""
    lora = _lora(RUNS / "lora_8", base)
    cache = RUNS / "cache"
    plain, adapted = RUNS / "genai_int4", RUNS / "genai_int4_lora"
    for output, extra in ((plain, {}), (adapted, {"adapter_path": str(lora)})):
        if not (output / "genai_config.json").is_file():
            progress(f"onnxruntime-genai's builder, {output.name}")
            build(base, output, "int4", cache, **extra)
    sides: dict[str, Side] = {
        "genai's base": (open_model(plain, THREADS), None),
        "genai's, with the adapter": (open_model(adapted, THREADS), None),
    }
    times = _interleaved(sides, "onnxruntime-genai's own, int4, r=8", iterations)
    rows = [{"graph": side, "ms a token": 1e3 * seconds} for side, seconds in times.items()]
    report.tables.append(Table("decode, int4, r=8, onnxruntime-genai's own LoRA", rows))
    ratio = times["genai's, with the adapter"] / times["genai's base"]
    report.claims.append(Claim("int4, r=8: onnxruntime-genai's own LoRA over its base", ratio))


def _lora(directory: Path, base: Path) -> Path:
    if not (directory / "adapter_config.json").is_file():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=smollm2.PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft.get_peft_model(model, config).save_pretrained(directory)
    return directory


def _compare_switches(report: Report, directory: Path, calls: int = 60) -> None:
    """Compare a call that switches adapters with one that does not; and binding all tensors."""
    served = load(directory)
    served.load_adapter("other", directory / "adapters" / "default.onnx_adapter")
    ids = np.array([[5]])
    names = ("default", "other")
    for name in names:
        served(input_ids=ids, adapter=name)
    same = [seconds_of(lambda: served(input_ids=ids, adapter="default")) for _ in range(calls)]
    switched = [seconds_of(lambda i=i: served(input_ids=ids, adapter=names[i % 2])) for i in range(calls)]
    binding = served.session.io_binding()
    bound = [seconds_of(lambda i=i: served.bind_adapter(binding, names[i % 2])) for i in range(calls)]
    chosen = [seconds_of(lambda i=i: served.adapters.tensors_for(names[i % 2], served.session)) for i in range(calls)]
    more = 1e3 * (statistics.median(switched) - statistics.median(same))
    report.claims.append(Claim("milliseconds that a call with another adapter takes longer", more, at_most=1.0))
    rows = [
        {"what": "call with the same adapter", "ms": 1e3 * statistics.median(same)},
        {"what": "call with another adapter", "ms": 1e3 * statistics.median(switched)},
        {"what": "choosing an adapter", "ms": 1e3 * statistics.median(chosen)},
        {"what": "binding all tensors", "ms": 1e3 * statistics.median(bound)},
    ]
    report.tables.append(Table("switching", rows))
