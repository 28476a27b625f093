"""Overhead of an adapter in a forward pass without gradients, compared with PEFT's: a linear layer, and MiniLM.

PEFT allocates intermediate tensors of the output's size, ours none. Their cost depends on the allocator, so two states
are measured that glibc reaches by itself: a process that has freed nothing larger than the layer's output returns
PEFT's memory after every call and faults it in at the next; one that has freed 32 MiB at once keeps it.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks.harness import Case, Claim, Report, Table, Timings, measure, progress, set_allocator
from benchmarks.models import LAYER, OneLinear, minilm
from gralora_fx import GraloraConfig, rewrite, trace

TOKENS = 512
ITERATIONS = {768: 80, 1024: 60, 2048: 30, 4096: 16}
STATES: dict[str, int | None] = {"memory returned": None, "memory kept": 2**25}
RANKS = ((32, 2, 0), (64, 4, 0), (32, 2, 16))


def run() -> Report:
    """Compare the overhead over the bare layer for several widths and ranks, and over a whole model."""
    report = Report("forward", f"forward: overhead over the bare layer, {TOKENS} tokens, fp32, no gradients")
    with torch.no_grad():  # layers first: they would reuse memory freed before them
        for state, largest_freed in STATES.items():
            report.tables.append(Table(f"one layer, {state}; ms", _layers(report, state, largest_freed)))
        report.tables.append(_model())
    report.notes.append(
        "overheads (+) are medians of the differences within an iteration; floor: the two multiplications alone, "
        f"[{TOKENS}, in] x [in, rank] and in place [{TOKENS}, rank] x [rank, out], dense. Where memory is returned, "
        "the first of our two sides after PEFT's (the graph) also faults in again what the heap gave back then"
    )
    return report


def _layers(report: Report, state: str, largest_freed: int | None) -> list[dict[str, Any]]:
    """Return the rows of every width and rank; claims are for the state in which allocation counts."""
    rows = []
    for width, iterations in ITERATIONS.items():
        set_allocator(largest_freed or TOKENS * width * 4)
        for r, k, hybrid_r in RANKS:
            label = f"{width} r={r} k={k}" + (f" h={hybrid_r}" if hybrid_r else "")
            progress(f"forward, {state}, {label}")
            options = {"r": r, "gralora_k": k, "hybrid_r": hybrid_r, "target_modules": [LAYER], "init_weights": False}
            rows.append(_row(label, _layer(width, options, rank=r + hybrid_r, iterations=iterations)))
    if largest_freed is None:
        report.claims += [Claim(f"{row['']}, {state}: ours / PEFT", row["ours / PEFT"], at_most=0.4) for row in rows]
    return rows


def _row(label: str, timings: Timings) -> dict[str, Any]:
    over = {name: timings.over(name, "bare") for name in timings.seconds if name not in ("bare", "floor")}
    added = {name: statistics.median(differences) for name, differences in over.items()}
    row = {"": label, "bare": 1e3 * timings.median("bare")}
    row |= {f"+ {name}": 1e3 * value for name, value in added.items()}
    row["ours / PEFT"] = added["ours model"] / added["PEFT"]
    row["pairwise"] = statistics.median(a / b for a, b in zip(over["ours model"], over["PEFT"], strict=True) if b)
    if "floor" in timings.seconds:
        floor = timings.median("floor")
        row |= {"floor": 1e3 * floor, "floor / PEFT": floor / added["PEFT"]}
    return row


def _layer(width: int, options: dict[str, Any], *, rank: int, iterations: int) -> Timings:
    """Time the bare layer, the rewritten graph and model, PEFT's layer, and the floor.

    All sides read the same weight.
    """
    torch.manual_seed(0)
    source = OneLinear(width).eval()
    bare, x = source.proj, torch.randn(1, TOKENS, width)
    ours = rewrite(trace(source, {"x": x}), GraloraConfig(**options))
    layer = peft.get_peft_model(source, peft.GraloraConfig(**options)).eval().base_model.model.proj
    rows, first, second, y = x[0], torch.randn(width, rank), torch.randn(rank, width), torch.randn(TOKENS, width)

    def floor() -> Tensor:
        return y.addmm_(torch.mm(rows, first), second, alpha=1e-3)

    cases = [
        Case.of("bare", lambda: bare(x)),
        Case.of("ours graph", lambda: ours.graph_module(x=x)),
        Case.of("ours model", lambda: ours(x=x)),
        Case.of("PEFT", lambda: layer(x)),
        Case.of("floor", floor),
    ]
    return measure(cases, iterations=iterations, warmup=5)


def _model() -> Table:
    """Time MiniLM with every linear layer adapted, relative to the eager model and to its trace."""
    progress("forward, MiniLM")
    torch.manual_seed(0)
    source = minilm()
    ids = torch.randint(source.config.vocab_size, (8, TOKENS // 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = []
    for r, k, hybrid_r in RANKS:
        options = {"r": r, "gralora_k": k, "hybrid_r": hybrid_r, "target_modules": "all-linear"}
        traced = trace(source, inputs, task="feature-extraction")
        ours = rewrite(traced, GraloraConfig(**options))
        theirs = peft.get_peft_model(copy.deepcopy(source), peft.GraloraConfig(**options)).eval()
        cases = [
            Case.of("bare", lambda: source(**inputs)),
            Case.of("bare trace", lambda traced=traced: traced(**inputs)),
            Case.of("ours model", lambda ours=ours: ours(**inputs)),
            Case.of("PEFT", lambda theirs=theirs: theirs(**inputs)),
        ]
        rows.append(_row(f"r={r} k={k} h={hybrid_r}", measure(cases, iterations=30)))
    return Table("MiniLM, 37 layers adapted, batch 8x64, memory kept; ms", rows)
