"""Eight adapters of SmolLM2-135M trained in one batch, compared with eight batches in sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx import GraloraConfig, rewrite, trace

RUNS = Path("runs/checkpointing")
ADAPTERS, BATCH, LENGTH = 8, 2, 64


def run(iterations: int = 5) -> Report:
    """Compare whole steps: forward, backward and a separate AdamW per adapter."""
    report = Report(
        "adapter-rows",
        f"adapter rows: a step of {ADAPTERS} GraLoRA adapters of SmolLM2-135M, {BATCH}x{LENGTH} tokens each, fp32",
    )
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_pretrained(smollm2.base(RUNS / "base"), dtype=torch.float32)
    traced, names = trace(source, task="text-generation"), [f"adapter{index}" for index in range(ADAPTERS)]
    ids = torch.randint(source.config.vocab_size, (ADAPTERS * BATCH, LENGTH))
    rows = [name for name in names for _ in range(BATCH)]
    for rank in (64, 8):
        progress(f"adapter rows, r={rank}")
        config = GraloraConfig(r=rank, gralora_k=4, target_modules=smollm2.PROJECTIONS)
        model = rewrite(traced, config, adapter_name=names[0]).train()
        for name in names[1:]:
            model.add_adapter(name, config)
        optimizers = {name: torch.optim.AdamW(model.adapter(name).parameters(), lr=1e-4) for name in names}
        cases = [
            Case.of("one batch", lambda: _together(model, optimizers, ids, rows)),  # noqa: B023  # run in this turn
            Case.of("one after the other", lambda: _apart(model, optimizers, ids)),  # noqa: B023
        ]
        timings = measure(cases, iterations=iterations, warmup=1)
        table = [timings.row(case.name, "one after the other") for case in cases]
        report.tables.append(Table(f"a step of all {ADAPTERS}, r={rank} k=4", table))
        ratio = timings.ratio("one batch", "one after the other").median_of_pairs
        report.claims.append(Claim(f"r={rank}: one batch over one after the other", ratio, at_most=0.7))
    return report


def _together(model: Any, optimizers: dict[str, Any], ids: torch.Tensor, rows: list[str]) -> None:
    model.set_requires_grad(list(optimizers))
    sum(model.losses_by_adapter(input_ids=ids, labels=ids, adapter_names=rows).values()).backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


def _apart(model: Any, optimizers: dict[str, Any], ids: torch.Tensor) -> None:
    for (name, optimizer), own in zip(optimizers.items(), ids.split(BATCH), strict=True):
        model.set_adapter(name)
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
