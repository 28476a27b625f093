"""Comparison of an export's greedy tokens with the model's, step by step, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gralora_fx.exporters.reports import TokenCheck
from gralora_fx.exporters.verification.cases import PromptBatch, TokenResult, TokenRun
from gralora_fx.exporters.verification.decoder_steps import DecoderSteps, ModelSteps, Step
from gralora_fx.exporters.verification.float64_reference import ToleranceCheck
from gralora_fx.exporters.verification.tensor_names import last_logits
from gralora_fx.exporters.verification.tolerances import largest_gap, largest_value
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.tracing.traced_model import TracedModel

Reader = Callable[[PromptBatch], Step]  # from prompts to what reads them


def compare_tokens(run: TokenRun) -> TokenResult:
    """What a decoder's verification compares of its greedy tokens: those after every prompt.

    Raises:
        ExportError: The model or the export cannot run.
    """
    if not run.prompts:  # of a context too short for any
        return TokenResult()
    readers: dict[str, Reader] = {"": reader(run.session)}
    if run.rows is not None:
        readers["rows: "] = run.rows
    tokens, *rows = compare_greedy(readers, run.model, run.prompts, run.tolerance_check)
    passed = all(check.passed for check in (tokens, *rows))
    return TokenResult(passed, tokens, rows=rows[0] if rows else None)


def reader(session: Any) -> Reader:
    """How a session over `model.onnx` begins to read prompts."""
    return lambda prompts: DecoderSteps(session, prompts.ids.shape[0], prompts.description)


def compare_greedy(
    readers: Mapping[str, Reader],
    model: TracedModel | GraloraModel,
    cases: Iterable[PromptBatch],
    tolerance_check: ToleranceCheck,
) -> list[TokenCheck]:
    """Compare logits and the likeliest token of several graphs with one run of the model; all continue with its token.

    The first one alone reads prompts with padding before what follows: rows of their own lengths have none.

    Args:
        readers: What reads prompts with each graph, by what a report calls the graph.
        model: The model in evaluation mode.
        cases: Batches of prompts.
        tolerance_check: Decides which differences of the logits are acceptable.

    Raises:
        ExportError: The model or the export cannot run.
    """
    tallies = {label: _Tally(label) for label in readers}
    for prompts in cases:
        labels = list(readers) if prompts.mask[:, -1].all() else list(readers)[:1]
        for label in labels:
            tallies[label].cases.append(prompts.description)
        for index, step in enumerate(_steps([readers[label] for label in labels], model, prompts)):
            for label, actual in zip(labels, step.actual, strict=True):
                tallies[label].add(index, step, actual, tolerance_check, prompts.description)
    return [tally.result() for tally in tallies.values()]


class _Step(NamedTuple):
    """The logits of all for one token, and the tokens read until then.

    Attributes:
        expected: Logits of the model, `[batch, vocabulary]`.
        actual: Those of each graph.
        ids: `[batch, length]`, from the prompt's first token on.
        mask: As `ids`.
    """

    expected: Tensor
    actual: tuple[Tensor, ...]
    ids: Tensor
    mask: Tensor


def _steps(readers: Sequence[Reader], model: TracedModel | GraloraModel, prompts: PromptBatch) -> Iterator[_Step]:
    """The last position's logits of model and export, step by step."""
    ids, mask, history = prompts.ids, prompts.mask, prompts.ids
    own = ModelSteps(model, ids.shape[0], prompts.description)
    steps: list[Step] = [own, *(reader(prompts) for reader in readers)]
    for _ in range(prompts.steps):
        expected, *actual = (
            logits if logits.shape[1] < ids.shape[1] else last_logits(logits, mask)
            for logits in (read(ids, mask).float() for read in steps)
        )
        yield _Step(expected[:, -1], tuple(logits[:, -1] for logits in actual), history, mask)
        ids = expected[:, -1].argmax(-1, keepdim=True)
        history = torch.cat([history, ids], dim=1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


class _Tally:
    """The results of all steps of a graph, accumulated."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.cases: list[str] = []
        self._compared = self._equal = self._ties = 0
        self._first: str | None = None
        self._errors: dict[int, float] = {}
        self._passed = True

    def add(self, index: int, step: _Step, actual: Tensor, tolerance_check: ToleranceCheck, case: str) -> None:
        """Count one step of every row."""
        expected = step.expected
        self._passed &= tolerance_check.accepts(
            f"{self._label}{case}, token {index}", expected, actual, lambda model: model.after(step.ids, step.mask)
        )
        scale = max(tolerance_check.least_scale, largest_value(expected))
        self._errors[index] = max(self._errors.get(index, 0.0), largest_gap(expected, actual) / scale)
        wanted, got = expected.argmax(-1), actual.argmax(-1)
        self._compared += wanted.shape[0]
        self._equal += int((wanted == got).sum())
        for row in (wanted != got).nonzero().flatten().tolist():
            token, other = int(wanted[row]), int(got[row])
            is_tie = float(expected[row, token] - expected[row, other]) <= 2 * tolerance_check.tolerance * scale
            self._ties += is_tie
            if self._first is None:
                tie = " (a near tie)" if is_tie else ""
                self._first = f"{case}: row {row}, token {index} is {other} instead of {token}{tie}"

    def result(self) -> TokenCheck:
        errors = tuple(self._errors[step] for step in sorted(self._errors))
        return TokenCheck(tuple(self.cases), self._compared, self._equal, self._ties, self._first, errors, self._passed)
