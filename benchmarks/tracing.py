"""The time to add adapters to a model: `trace` and `rewrite`, compared with PEFT's wrapping.

PEFT replaces modules without tracing; transformers' exporter alone shows tracing's share of our time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from benchmarks.harness import Case, Report, Table, measure, progress
from benchmarks.models import minilm, small_llama
from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.base.compat.transformers_exporters import export_program
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.tracing.capture import dynamic_axes

OPTIONS: dict[str, Any] = {"r": 8, "gralora_k": 2, "target_modules": "all-linear"}
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "MiniLM, 6 layers": (minilm, "feature-extraction"),
    "Llama, 12 layers": (small_llama, "text-generation"),
}


def run(iterations: int = 3) -> Report:
    """Measure tracing and rewriting of two models."""
    report = Report("tracing", "tracing: from a model to one with adapters, all linear layers, r=8 k=2")
    for label, (load, task) in MODELS.items():
        progress(f"tracing, {label}")
        report.tables.append(_compare(label, load(), task, iterations))
    report.notes.append(
        "exporter alone: transformers' DynamoExporter on the same inputs; trace runs it once and checks the graph "
        "against the model"
    )
    return report


def _compare(label: str, model: PreTrainedModel, task: str, iterations: int) -> Table:
    traced = trace(model, task=task)
    wrapped = copy.deepcopy(model)

    def unwrap(_: Any = None) -> PreTrainedModel:
        nonlocal wrapped
        wrapped = copy.deepcopy(model)
        return wrapped

    @quiet()
    def export_alone() -> ExportedProgram:
        inputs = traced.example_inputs
        return export_program(model, inputs, dynamic_axes(inputs), dynamic=True)

    cases = [
        Case.of("exporter alone", export_alone),
        Case.of("ours trace", lambda: trace(model, task=task)),
        Case.of("ours rewrite", lambda: rewrite(traced, GraloraConfig(**OPTIONS))),
        Case(
            "PEFT get_peft_model",
            lambda fresh: peft.get_peft_model(fresh, peft.GraloraConfig(**OPTIONS)),
            unwrap,
            unwrap,
        ),
    ]
    timings = measure(cases, iterations=iterations, warmup=1)
    rows = [timings.row(case.name, "exporter alone") for case in cases]
    return Table(f"{label}, {len(traced.graph_module.graph.nodes)} nodes, {len(traced.sites)} linear sites", rows)
