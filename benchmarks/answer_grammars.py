"""The cost of grammars: steps of 8 rows that each choose tokens under a grammar, compared with the same rows without.

SmolLM2-135M with a GraLoRA adapter folded in, float32 and int4, on two threads. Every row has its own JSON schema,
whose answer is a list of objects that does not end during the measurement. Both sides step in turns, one token per row.
Forced tokens are counted but not read, so that rows stay equally long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import smollm2
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx.features.structured_outputs.answer_form import AnswerForm
from gralora_fx.run.generate.answer_options import Sampling
from gralora_fx.run.generate.token_choice import TokenChooser
from gralora_fx.serving import load

RUNS = Path("runs/generation")
THREADS, ROWS, PROMPT, NEW = 2, 8, 64, 400
MOST = 1.03
PLAIN, WITH = "without grammars", "with a grammar in each row"


def run(iterations: int = 60) -> Report:
    """Time `iterations` steps of rows on each side."""
    report = Report("answer_grammars", "grammars of answers: SmolLM2-135M, 8 rows")
    torch.set_num_threads(1)  # as in the service
    for precision, directory in smollm2.exports(RUNS):
        _compare(report, directory, precision, iterations)
    return report


def _compare(report: Report, directory: Path, precision: str, iterations: int) -> None:
    model = load(directory, threads=THREADS)
    for name, options in (("likeliest token", {}), ("drawn, top_p 0.9", {"do_sample": True, "top_p": 0.9, "seed": 1})):
        progress(f"{precision}, {name}")
        steps: dict[str, list[float]] = {PLAIN: [], WITH: []}
        choices: dict[str, list[float]] = {PLAIN: [], WITH: []}
        sides = {side: _Rows(model, side == WITH, options) for side in steps}
        for iteration in range(-5, iterations):
            for side in (PLAIN, WITH)[:: 1 if iteration % 2 else -1]:
                seconds, chosen = sides[side].step()
                if iteration >= 0:
                    steps[side].append(seconds)
                    choices[side].append(chosen)
        rows: list[Mapping[str, Any]] = [
            {"tokens": name, "rows": side, "step, ms": 1e3 * statistics.median(steps[side])}
            | {"of it choosing, ms": 1e3 * statistics.median(choices[side]), "forced": sides[side].forced}
            for side in steps
        ]
        report.tables.append(Table(f"{precision}, {name}", rows))
        ratio = Ratio.between(steps[WITH], steps[PLAIN]).of_medians
        report.claims.append(Claim(f"{precision}, {name}: a step over one without grammars", ratio, at_most=MOST))


class _Rows:
    """Rows that read a prompt and then take steps of one token each.

    Attributes:
        forced: Number of tokens that the grammars forced.
    """

    def __init__(self, model: Any, has_grammars: bool, options: Mapping[str, Any]) -> None:
        self._decoder = model.decoder(rows=ROWS, capacity=PROMPT + NEW, chunk=PROMPT)
        prompt = np.random.default_rng(0).integers(10, 40000, PROMPT).tolist()
        numbers = [self._decoder.open() for _ in range(ROWS)]
        self._choosers = {}
        for number in numbers:
            grammar = model.constraints.compiled(_form(number)).begin(frozenset(), NEW) if has_grammars else None
            self._choosers[number] = TokenChooser(Sampling(**options), prompt, frozenset(), (), grammar)
        self._logits = self._decoder.step(dict.fromkeys(numbers, prompt))
        self.forced = 0

    def step(self) -> tuple[float, float]:
        """Choose a token in each row and read it; return the seconds of both, and of choosing alone.

        Forced tokens are left to the next steps, so that both sides read one token a row.
        """
        started = time.perf_counter()
        tokens = {}
        for number, chooser in self._choosers.items():
            choice = chooser(self._logits[number])
            tokens[number] = [choice.token]
            self.forced += len(choice.forced)
        chosen = time.perf_counter() - started
        self._logits = self._decoder.step(tokens)
        return time.perf_counter() - started, chosen


def _form(number: int) -> AnswerForm:
    """Return a row's own schema: a long list of objects with a few fields."""
    fields = {
        f"name_{number}": {"type": "string", "maxLength": 40},
        "count": {"type": "integer", "minimum": 0, "maximum": 10**6},
        "kind": {"enum": ["animal", "plant", "mineral"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "[a-z ]{2,12}"}, "maxItems": 6},
        "score": {"type": "number"},
    }
    item = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return AnswerForm.of("json", {"type": "array", "items": item, "minItems": 500})
