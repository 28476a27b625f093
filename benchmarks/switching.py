"""The cost of switching adapters, compared with PEFT's, and of a disabled adapter while the model runs.

The first switch to a state builds and compiles its graph, so its time grows with the number of nodes; later ones reuse
the graph. PEFT sets attributes of modules. Both sides run in one process and are measured in turns.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import Case, Claim, Report, Table, Timings, measure, progress
from benchmarks.models import minilm, small_llama
from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite, trace

OPTIONS: dict[str, Any] = {"r": 8, "gralora_k": 2, "target_modules": "all-linear", "init_weights": False}
ADAPTERS = ("first", "second")
FIRST = "set_adapter, a new state"
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "MiniLM, 6 layers": (minilm, "feature-extraction"),
    "Llama, 12 layers": (small_llama, "text-generation"),
}


@dataclass(frozen=True)
class Sides:
    """One model with the same two adapters on both sides, the first of them active."""

    source: PreTrainedModel  # the bare model
    traced: TracedModel  # its trace
    ours: GraloraModel  # the rewritten trace
    theirs: peft.PeftModel  # PEFT's wrapped copy

    @classmethod
    def of(cls, source: PreTrainedModel, task: str) -> Sides:
        """Adapt a model on both sides."""
        torch.manual_seed(0)
        traced = trace(source, task=task)
        ours = rewrite(traced, GraloraConfig(**OPTIONS), adapter_name=ADAPTERS[0])
        theirs = peft.get_peft_model(copy.deepcopy(source), peft.GraloraConfig(**OPTIONS), adapter_name=ADAPTERS[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT's, about a second adapter on one model
            theirs.add_adapter(ADAPTERS[1], peft.GraloraConfig(**OPTIONS))
        ours.add_adapter(ADAPTERS[1], GraloraConfig(**OPTIONS))
        return cls(source, traced, ours, theirs.eval())


def run(iterations: int = 30) -> Report:
    """Measure switches, and the forward with adapters disabled, of two models."""
    report = Report("switching", "switching: two adapters over all linear layers, r=8 k=2, fp32")
    for label, (load, task) in MODELS.items():
        progress(f"switching, {label}")
        sides = Sides.of(load(), task)
        report.tables.append(_switches(report, label, sides, iterations))
        report.tables.append(_disabled_forward(report, label, sides, iterations))
    report.notes.append(
        "set_adapter is one call, from the first adapter to the second, the others are pairs of calls; an adapter that "
        "was added since makes every state a new one. Nodes: of the graph with one adapter in it"
    )
    return report


def _switches(report: Report, label: str, sides: Sides, iterations: int) -> Table:
    """Return a row for every change, with both sides."""
    ours, theirs = sides.ours, sides.theirs

    def switching(side: str, model: Any) -> Case[Any]:
        def back(_: Any) -> Any:
            model.set_adapter(ADAPTERS[0])
            return model

        return Case(f"{side} set_adapter", lambda model: model.set_adapter(ADAPTERS[1]), lambda: model, back)

    def our_disable() -> None:
        with ours.disable_adapter():
            pass

    def their_disable() -> None:
        theirs.base_model.disable_adapter_layers()
        theirs.base_model.enable_adapter_layers()

    def merge_and_back(model: Any) -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "disable, enable": (our_disable, their_disable),
        "merge, unmerge": (lambda: merge_and_back(ours), lambda: merge_and_back(theirs)),
    }

    def renewed(model: GraloraModel) -> GraloraModel:
        """Return the model after another adapter was added and removed, which invalidates its graphs."""
        model.set_adapter(ADAPTERS[0])
        model.add_adapter("other", GraloraConfig(**OPTIONS))
        model.delete_adapter("other")
        return model

    first = Case(
        f"ours {FIRST}", lambda model: model.set_adapter(ADAPTERS[1]), lambda: renewed(copy.deepcopy(ours)), renewed
    )
    cases: list[Case[Any]] = [switching("ours", ours), switching("PEFT", theirs), first]
    for what, functions in pairs.items():
        cases += [Case.of(f"{side} {what}", run) for side, run in zip(("ours", "PEFT"), functions, strict=True)]
    timings = measure(cases, iterations=iterations)
    nodes, base_nodes = (len(model.graph_module.graph.nodes) for model in (ours, sides.traced))
    rows = [_row(what, timings, nodes) for what in ("set_adapter", *pairs)]
    rows.insert(1, _row(FIRST, timings, nodes, peer="PEFT set_adapter"))
    report.claims.append(Claim(f"{label}: ours / PEFT, set_adapter", rows[0]["pairwise"], at_most=1.0))
    return Table(f"{label}: {base_nodes} nodes, {nodes} with an adapter; ms", rows)


def _row(what: str, timings: Timings, nodes: int, *, peer: str | None = None) -> dict[str, Any]:
    """Measure both sides of one change; return their row."""
    peer = peer or f"PEFT {what}"
    ours, theirs = timings.median(f"ours {what}"), timings.median(peer)
    ratio = timings.ratio(f"ours {what}", peer)
    times = timings.seconds[f"ours {what}"]
    return {
        "": what,
        "ours": 1e3 * ours,
        "min": 1e3 * min(times),
        "max": 1e3 * max(times),
        "ours per 100 nodes": 1e5 * ours / nodes,
        "PEFT": 1e3 * theirs,
        "ours / PEFT": ratio.of_medians,
        "pairwise": ratio.median_of_pairs,
    }


def _disabled_forward(report: Report, label: str, sides: Sides, iterations: int) -> Table:
    """Compare the forward pass with adapters disabled with each side's own bare model."""
    ids = torch.randint(sides.source.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own = {"use_cache": False} if "CausalLM" in type(sides.source).__name__ else {}  # a trace has no cache

    def bare() -> Tensor:
        return sides.source(**inputs, **own)[0]

    def with_peft() -> Tensor:
        return sides.theirs(**inputs, **own)[0]

    sides.theirs.base_model.disable_adapter_layers()
    with torch.no_grad(), sides.ours.disable_adapter():
        cases = [
            Case.of("bare trace", lambda: sides.traced(**inputs)),
            Case.of("ours, disabled", lambda: sides.ours(**inputs)),
            Case.of("bare model", bare),
            Case.of("PEFT, disabled", with_peft),
        ]
        timings = measure(cases, iterations=iterations, warmup=3)
    sides.theirs.base_model.enable_adapter_layers()
    rows = [
        _over("ours, disabled", "bare trace", timings),
        _over("PEFT, disabled", "bare model", timings),
    ]
    report.claims.append(
        Claim(f"{label}: ours, disabled / bare trace, median of pairwise ratios", rows[0]["pairwise"], at_most=1.05)
    )
    return Table(f"{label}: forward with the adapters disabled, batch 4x64; ms", rows)


def _over(name: str, base: str, timings: Timings) -> dict[str, Any]:
    ratio = timings.ratio(name, base)
    return {
        "": name,
        "median ms": 1e3 * timings.median(name),
        "over": base,
        "its median ms": 1e3 * timings.median(base),
        "ratio": ratio.of_medians,
        "pairwise": ratio.median_of_pairs,
    }
