"""A training step on MiniLM, compared with PEFT's GraLoRA and LoRA: eager and compiled, and the adapters' own cost."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Claim, Report, Table, Timings, measure, progress
from benchmarks.models import minilm
from gralora_fx import GraloraConfig, LoraConfig, rewrite, trace

BATCH, LENGTH, RANK = 16, 64, 32
FLOOR = "frozen base"
GRALORA: dict[str, Any] = {"r": RANK, "gralora_k": 2, "target_modules": "all-linear"}
LORA: dict[str, Any] = {"r": RANK, "target_modules": "all-linear"}


def run(iterations: int = 20, *, compiled: bool = True) -> Report:
    """Compare whole steps: forward, backward and AdamW; with `compiled` also compiled ones, which takes minutes."""
    report = Report(
        "training", f"training: a step of MiniLM, batch {BATCH}x{LENGTH}, r={RANK}, all linear layers, fp32"
    )
    progress("training, MiniLM")
    torch.manual_seed(0)
    source = minilm().train()
    inputs = _inputs(source.config.vocab_size)
    traced = trace(source, inputs, task="feature-extraction")
    models: dict[str, nn.Module] = {
        "PEFT GraLoRA": peft.get_peft_model(copy.deepcopy(source), peft.GraloraConfig(**GRALORA)),
        "ours GraLoRA": rewrite(traced, GraloraConfig(**GRALORA)),
        "PEFT LoRA": peft.get_peft_model(copy.deepcopy(source), peft.LoraConfig(**LORA)),
        "ours LoRA": rewrite(traced, LoraConfig(**LORA)),
        FLOOR: _frozen(source),
    }
    timings = _timings(models, inputs, iterations)
    report.tables.append(Table("one step, eager", [timings.row(name, "PEFT GraLoRA") for name in models]))
    report.claims += [
        _claim(timings, "ours GraLoRA", "PEFT GraLoRA", 0.82),
        _claim(timings, "ours GraLoRA", "PEFT LoRA", 0.95),
        Claim(
            "adapters' share of a step (beyond the frozen base's): GraLoRA over PEFT's", _share(timings), at_most=0.5
        ),
    ]
    if compiled:
        progress("training, MiniLM, compiled")
        programs: dict[str, Any] = {name: torch.compile(models[name]) for name in ("PEFT GraLoRA", "ours GraLoRA")}
        timings = _timings(programs, inputs, iterations)
        report.tables.append(Table("one step, compiled", [timings.row(name, "PEFT GraLoRA") for name in programs]))
        report.claims.append(_claim(timings, "ours GraLoRA", "PEFT GraLoRA", 0.95, ", both compiled"))
    return report


def _inputs(vocabulary: int) -> dict[str, Tensor]:
    """Return a batch in which every fourth row is padded."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[::4, LENGTH * 3 // 4 :] = 0
    return {"input_ids": torch.randint(vocabulary, (BATCH, LENGTH)), "attention_mask": mask}


def _frozen(source: nn.Module) -> nn.Module:
    """Return the base alone, with gradients through all of it to a vector added to its embeddings."""
    frozen: Any = copy.deepcopy(source).requires_grad_(False)
    frozen.offset = nn.Parameter(torch.zeros(frozen.config.hidden_size))
    frozen.get_input_embeddings().register_forward_hook(lambda *call: call[2] + frozen.offset)
    return frozen


def _timings(models: Mapping[str, Any], inputs: dict[str, Tensor], iterations: int) -> Timings:
    cases = [Case(name, lambda step: step(), _stepper(model.train(), inputs)) for name, model in models.items()]
    return measure(cases, iterations=iterations)


def _stepper(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Callable[[], Any]]:
    """Return a case's setup: an optimizer over the trainable parameters, and a step with it."""

    def setup() -> Callable[[], Any]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            outputs = model(**inputs)
            loss = outputs.last_hidden_state.square().mean() + outputs.pooler_output.square().mean()
            loss.backward()
            optimizer.step()

        return step

    return setup


def _claim(timings: Timings, ours: str, theirs: str, at_most: float, how: str = "") -> Claim:
    return Claim(f"a step of {ours} over {theirs}{how}", timings.ratio(ours, theirs).median_of_pairs, at_most=at_most)


def _share(timings: Timings) -> float:
    ours, theirs = (statistics.median(timings.over(f"{name} GraLoRA", FLOOR)) for name in ("ours", "PEFT"))
    return ours / theirs
