"""Greedy tokens of an export held against the model's, step by step, each with the cache of its own steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.folded_model import base_of
from gralora_fx.exporters.reports import TokenCheck
from gralora_fx.exporters.verification.float64_reference import Judge
from gralora_fx.exporters.verification.inputs import context_of, last_logits, vocabulary_of
from gralora_fx.exporters.verification.tolerances import largest_gap, largest_value
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.ort_values import as_tensor, empty_values, run_values
from gralora_fx.tracing.inputs.decoder_cache import PAST, empty_cache, positions
from gralora_fx.tracing.traced_model import TracedModel

_LONG = 1000  # positions of the longest context, where the model has as many
# lengths of the prompts that run together, the side of their padding, and how many tokens are compared
_DRAWN: tuple[tuple[tuple[int, ...], str, int], ...] = (
    ((12,), "left", 16),
    ((17, 3, 11, 6), "left", 16),
    ((9, 5, 7), "right", 4),
    ((_LONG,), "left", 4),
)
_QUICK: tuple[tuple[tuple[int, ...], str, int], ...] = (((7, 3), "left", 4),)


@dataclass(frozen=True)
class Prompts:
    """Prompts that run together.

    Attributes:
        description: What they are.
        ids: `[batch, length]`.
        mask: `[batch, length]`, 0 where a position is padding.
        steps: How many tokens to compare.
    """

    description: str
    ids: Tensor
    mask: Tensor
    steps: int


def drawn_prompts(model: TracedModel, seed: int, *, quick: bool = False) -> Iterator[Prompts]:
    """Random prompts: one, several of unequal length padded on either side, and one that fills the context.

    Args:
        model: A model traced with a cache.
        seed: Seed of the tokens.
        quick: Whether two short ones are enough, padded left.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary, context = vocabulary_of(model) or 4, context_of(model) or _LONG
    for lengths, side, steps in _QUICK if quick else _DRAWN:
        room = min(context, _LONG) - steps
        if room < 1:
            continue
        sizes = [min(length, room) for length in lengths]
        rows = [torch.randint(min(3, vocabulary - 1), vocabulary, (size,), generator=generator) for size in sizes]
        yield together([row.tolist() for row in rows], side=side, steps=steps)


def together(rows: Sequence[Sequence[int]], *, side: str = "left", steps: int = 16, what: str = "prompt") -> Prompts:
    """Prompts as one batch, shorter ones padded.

    Args:
        rows: Token ids by prompt.
        side: Where padding stands.
        steps: How many tokens to compare.
        what: What they are called.
    """
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        kept = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, kept], mask[index, kept] = torch.tensor(row), 1
    sizes = sorted({len(row) for row in rows})
    size = f"{sizes[0]} to {sizes[-1]} tokens padded {side}" if len(sizes) > 1 else f"{longest} tokens"
    return Prompts(f"{len(rows)} {what}{'s' * (len(rows) > 1)} of {size}", ids, mask, steps)


def compare_greedy(
    session: Any, model: TracedModel | GraloraModel, cases: Iterable[Prompts], judge: Judge
) -> TokenCheck:
    """Compare logits and the likeliest token at every step; both go on with the model's token.

    Args:
        session: A session over an export with a cache.
        model: The model in evaluation mode.
        cases: Prompts to begin with.
        judge: Says which differences of the logits are allowed.

    Raises:
        ExportError: The model or the export cannot run.
    """
    found = _Found()
    for prompts in cases:
        found.cases.append(prompts.description)
        for index, step in enumerate(_steps(session, model, prompts)):
            found.add(index, step, judge, prompts.description)
    return found.result()


class _Step(NamedTuple):
    """What both gave for one token, and what they had read until then.

    Attributes:
        expected: Logits of the model, `[batch, vocabulary]`.
        actual: Those of the export.
        ids: `[batch, length]`, from the prompt's first token on.
        mask: As `ids`.
    """

    expected: Tensor
    actual: Tensor
    ids: Tensor
    mask: Tensor


def _steps(session: Any, model: TracedModel | GraloraModel, prompts: Prompts) -> Iterator[_Step]:
    """The last position's logits of model and export, step by step."""
    traced = base_of(model)
    takes = {value.name for value in session.get_inputs()}
    ids, mask, read = prompts.ids, prompts.mask, prompts.ids
    cache: Any = empty_cache(traced.example_inputs[PAST], ids.shape[0])
    values = empty_values(session, ids.shape[0])
    for _ in range(prompts.steps):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, ids.shape[1])}
        try:
            with torch.no_grad():
                taken = {n: v for n, v in inputs.items() if n in traced.input_names}
                outputs = model(**traced.constants, **taken, past_key_values=cache)
        except Exception as error:  # a model raises what it likes
            raise ExportError(f"the model itself fails on {prompts.description}: {first_line(error)}") from error
        cache = outputs[PAST]
        feed = {name: value for name, value in inputs.items() if name in takes}
        results = run_values(session, {**feed, **values}, prompts.description)
        values = {
            name.replace("present.", "past_key_values."): value
            for name, value in results.items()
            if name.startswith("present.")
        }
        expected, actual = (
            logits if logits.shape[1] < ids.shape[1] else last_logits(logits, mask)
            for logits in (outputs["logits"].float(), as_tensor(results["logits"]).float())
        )
        yield _Step(expected[:, -1], actual[:, -1], read, mask)
        ids = expected[:, -1].argmax(-1, keepdim=True)
        read = torch.cat([read, ids], dim=1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


class _Found:
    """What the steps add up to."""

    def __init__(self) -> None:
        self.cases: list[str] = []
        self._compared = self._equal = self._ties = 0
        self._first: str | None = None
        self._errors: dict[int, float] = {}
        self._passed = True

    def add(self, index: int, step: _Step, judge: Judge, case: str) -> None:
        """Count one step of every row."""
        expected, actual = step.expected, step.actual
        self._passed &= judge.accepts(
            f"{case}, token {index}", expected, actual, lambda model: model.after(step.ids, step.mask)
        )
        scale = max(1.0, largest_value(expected))
        self._errors[index] = max(self._errors.get(index, 0.0), largest_gap(expected, actual) / scale)
        wanted, got = expected.argmax(-1), actual.argmax(-1)
        self._compared += wanted.shape[0]
        self._equal += int((wanted == got).sum())
        for row in (wanted != got).nonzero().flatten().tolist():
            token, other = int(wanted[row]), int(got[row])
            is_tie = float(expected[row, token] - expected[row, other]) <= 2 * judge.tolerance * scale
            self._ties += is_tie
            if self._first is None:
                tie = " (a near tie)" if is_tie else ""
                self._first = f"{case}: row {row}, token {index} is {other} instead of {token}{tie}"

    def result(self) -> TokenCheck:
        errors = tuple(self._errors[step] for step in sorted(self._errors))
        return TokenCheck(tuple(self.cases), self._compared, self._equal, self._ties, self._first, errors, self._passed)
