"""Sixteen activated adapters over one context: tokens that each reads of it, its first token, and a step of eight rows.

SmolLM2-135M with LoRA adapters on all seven projections, each activated by its own invocation tokens. One decoder with
a prefix cache reads a context of 2,000 tokens for the first; the others reuse it. A step of eight rows with activated
adapters is measured beside one of eight rows with plain adapters of the same tensors.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx import LoraConfig, rewrite, trace
from gralora_fx.base.sources.model_files import EXPORT_FILE
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import part_length
from gralora_fx.serving import load

RUNS = Path("runs/activated")
ADAPTERS, CONTEXT, ROWS, THREADS = 16, 2000, 8, 2
PLAIN, ACTIVATED = "eight rows, plain", "eight rows, activated"


def run(iterations: int = 25) -> Report:
    """Time `iterations` runs of each kind of step, after first tokens over one context."""
    report = Report("activated", f"{ADAPTERS} activated adapters over {CONTEXT} tokens: SmolLM2-135M, LoRA r=8")
    model = load(_export(smollm2.base(RUNS / "base")), threads=THREADS)
    generator = np.random.default_rng(0)
    context = generator.integers(100, 40_000, CONTEXT).tolist()
    decoder = model.decoder(rows=ROWS, capacity=CONTEXT + 64, prefix_cache=2**29)
    progress("a context that all adapters answer")
    rows: list[dict[str, Any]] = []
    for number in range(ADAPTERS):
        prompt = [*context, *_invocation(number), *generator.integers(100, 40_000, 6).tolist()]
        read, seconds = _first_token(decoder, prompt, _name(number))
        rows.append({"adapter": _name(number), "tokens read": read, "first token s": seconds})
    report.tables.append(Table("one context, adapter after adapter", rows))
    firsts = [row["first token s"] for row in rows]
    report.claims.append(
        Claim("first token of the second adapter over the first's", firsts[1] / firsts[0], at_most=0.1)
    )
    slowest = max(firsts[1:]) / firsts[0]
    report.claims.append(Claim("slowest first token of the others over the first's", slowest, at_most=0.1))
    own = sum(row["tokens read"] for row in rows) - 8 * ADAPTERS  # each reads its invocation and its question
    report.claims.append(Claim("tokens of the context that were read over its length", own / CONTEXT, at_most=1.05))
    progress("steps of eight rows")
    steps = {PLAIN: TokenSteps(model, "plain", 0), ACTIVATED: TokenSteps(model, "adapter", 16)}
    times = measure([Case.of(name, each) for name, each in steps.items()], iterations=iterations)
    report.tables.append(Table(f"a token of {ROWS} rows", [times.row(name, PLAIN) for name in steps]))
    ratio = times.ratio(ACTIVATED, PLAIN).median_of_pairs
    report.claims.append(Claim("a step of activated rows over one of plain rows", ratio, at_most=1.05))
    return report


def _name(number: int) -> str:
    return f"adapter_{number}"


def _invocation(number: int) -> list[int]:
    return [50 + number, 90]


def _export(base: Path) -> Path:
    """Make an export with the adapters, and plain ones like the first for the compared rows, once."""
    path = RUNS / "data"
    if (path / EXPORT_FILE).is_file():
        return path
    progress("export with adapters as data")
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    traced = trace(source, task="text-generation-with-past")
    fields: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 2,
        "target_modules": smollm2.PROJECTIONS,
        "init_lora_weights": False,
    }
    torch.manual_seed(0)
    model = rewrite(traced, LoraConfig(**fields, alora_invocation_tokens=_invocation(0)), adapter_name=_name(0))
    for number in range(1, ADAPTERS):
        model.add_adapter(_name(number), LoraConfig(**fields, alora_invocation_tokens=_invocation(number)))
    for number in range(ROWS):
        model.add_adapter(f"plain_{number}", LoraConfig(**fields))
    model.set_adapter(list(model.configs))
    export_onnx(model, path, adapters="data", verify=False, overwrite=True)
    return path


def _first_token(decoder: Decoder, prompt: list[int], adapter: str) -> tuple[int, float]:
    """Return the number of tokens that a request reads, and the seconds until its answer's first token."""
    started = time.perf_counter()
    row = decoder.open(adapter, start=decoder.start_of(adapter, prompt))
    at = filled = decoder.fill(row, prompt)
    while at < len(prompt):
        part = part_length(len(prompt) - at, decoder.alone)
        logits = decoder.step({row: prompt[at : at + part]})[row]
        at += part
    int(logits.argmax())
    seconds = time.perf_counter() - started
    decoder.close(row)
    return len(prompt) - filled, seconds


class TokenSteps:
    """Rows that have each read a prompt, its first `start` tokens as the base; a step reads a token in each."""

    def __init__(self, model: Any, prefix: str, start: int = 0) -> None:
        """Open a row for each of the adapters `<prefix>_0`, `<prefix>_1` and so on."""
        self._decoder = model.decoder(rows=ROWS, capacity=512, chunk=64)
        generator = np.random.default_rng(1)
        names = [f"{prefix}_{number}" for number in range(ROWS)]
        self._rows = [self._decoder.open(name, start=start or None) for name in names]
        self._decoder.step({row: generator.integers(100, 40_000, 32).tolist() for row in self._rows})

    def __call__(self) -> None:
        """Read a token in every row, and rewind it."""
        self._decoder.step({row: [123] for row in self._rows})
        for row in self._rows:
            self._decoder.rewind(row, 32)
