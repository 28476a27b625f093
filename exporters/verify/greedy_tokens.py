"""An export's greedy tokens compared with the model's, step by step, each with a cache of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gralora_fx.base.progress.stages import counting
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cache import empty_cache, returned_cache
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.kinds.conversion import base_trace
from gralora_fx.exporters.verify.cases import PromptBatch, TokenResult, TokenRun
from gralora_fx.exporters.verify.compared_tensors import largest_gap, largest_value, last_logits, step_inputs
from gralora_fx.exporters.verify.mixed_rows import engine_errors
from gralora_fx.exporters.verify.tolerances import Float64Model, ToleranceCheck
from gralora_fx.exporters.verify_report import TensorCheck, TokenCheck
from gralora_fx.format.input_names import PAST
from gralora_fx.run.engine.encoder_decoder import EncoderDecoder, Encodings
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.sessions.ort_values import as_tensor, empty_values, run_values
from gralora_fx.run.sessions.session_views import as_past

Step = Callable[[Tensor, Tensor], Tensor]  # from new ids and the mask of all positions to logits
_TOKENS, _QUICK_TOKENS = 8, 3  # of an encoder-decoder
Reader = Callable[[PromptBatch], Step]  # from prompts to what reads them


class DecoderSteps:
    """A decoder of one graph, with the cache of the steps that it has taken."""

    def __init__(self, session: Any, batch: int, description: str = "a step") -> None:
        """Begin with an empty cache."""
        self._session, self._description = session, description
        self._names = {value.name for value in session.get_inputs()}
        self._cache = empty_values(session, batch)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens.

        Args:
            ids: `[batch, new]`.
            mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.

        Returns:
            Logits `[batch, new, vocabulary]`, or `[batch, 1, vocabulary]` of an export that gives the last alone.
        """
        inputs = step_inputs(ids, mask, self._names)
        results = run_values(self._session, {**inputs, **self._cache}, self._description)
        self._cache = as_past(results)
        return as_tensor(results["logits"])


class ModelSteps:
    """A traced decoder with the cache of the steps that it has taken; what `DecoderSteps` is for an export."""

    def __init__(self, model: TracedModel | GraloraModel, batch: int, description: str = "a step") -> None:
        """Begin with an empty cache."""
        self._model, self._traced, self._description = model, base_trace(model), description
        self._cache: Any = empty_cache(self._traced.example_inputs[PAST], batch)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens.

        Args:
            ids: `[batch, new]`.
            mask: `[batch, all]`, over those that were read before too; 0 where a position is padding.

        Returns:
            Logits `[batch, new, vocabulary]`.
        """
        inputs = step_inputs(ids, mask, self._traced.input_names)
        try:
            with torch.no_grad():
                outputs = self._model(**self._traced.constants, **inputs, past_key_values=self._cache)
        except Exception as error:  # a model raises what it likes
            raise ExportError(f"the model itself fails on {self._description}: {first_line(error)}") from error
        self._cache = returned_cache(outputs)
        logits: Tensor = outputs["logits"]
        return logits


def compare_decoder(run: TokenRun) -> TokenResult:
    """What a decoder's verification compares of its greedy tokens: those after every prompt."""
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
    cases: Collection[PromptBatch],
    tolerance_check: ToleranceCheck,
) -> list[TokenCheck]:
    """Compare logits and the likeliest token of several graphs with one run of the model; all continue with its token.

    The first one alone reads prompts with padding before what follows: rows of their own lengths have none.
    """
    tallies = {label: _Tally(label) for label in readers}
    done = itertools.count(1)
    with counting("comparing tokens", sum(prompts.steps for prompts in cases), "tokens") as count:
        for prompts in cases:
            labels = list(readers) if prompts.mask[:, -1].all() else list(readers)[:1]
            for label in labels:
                tallies[label].cases.append(prompts.description)
            in_float64 = _StepsInFloat64(prompts.ids.shape[0])
            for index, step in enumerate(_steps([readers[label] for label in labels], model, prompts)):
                in_float64.taken.append((step.ids, step.mask))
                for label, actual in zip(labels, step.actual, strict=True):
                    tallies[label].add(index, step, actual, tolerance_check, prompts.description, in_float64)
                count(next(done))
    return [tally.result() for tally in tallies.values()]


class _Step(NamedTuple):
    """The logits of all for one token, and the tokens that the step reads.

    Attributes:
        expected: Logits of the model, `[batch, vocabulary]`.
        actual: Those of each graph.
        ids: `[batch, new]`: the prompt, then a token.
        mask: `[batch, all]`, over the tokens that were read before too.
    """

    expected: Tensor
    actual: tuple[Tensor, ...]
    ids: Tensor
    mask: Tensor


def _steps(readers: Sequence[Reader], model: TracedModel | GraloraModel, prompts: PromptBatch) -> Iterator[_Step]:
    """The last position's logits of model and export, step by step."""
    ids, mask = prompts.ids, prompts.mask
    own = ModelSteps(model, ids.shape[0], prompts.description)
    steps: list[Step] = [own, *(reader(prompts) for reader in readers)]
    for _ in range(prompts.steps):
        expected, *actual = (
            logits if logits.shape[1] < ids.shape[1] else last_logits(logits, mask)
            for logits in (read(ids, mask).float() for read in steps)
        )
        yield _Step(expected[:, -1], tuple(logits[:, -1] for logits in actual), ids, mask)
        ids = expected[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


class _StepsInFloat64:
    """The steps of a batch in float64, each model with a cache of its own; none is run before it is needed.

    Attributes:
        taken: The new ids and the mask of every step until now.
    """

    def __init__(self, batch: int) -> None:
        self.taken: list[tuple[Tensor, Tensor]] = []
        self._batch = batch
        self._read: dict[Float64Model, Step] = {}
        self._logits: dict[Float64Model, list[Tensor]] = {}

    def __call__(self, model: Float64Model) -> Tensor:
        """Return the logits of the last step, `[batch, vocabulary]`, after those before it."""
        read = self._read.setdefault(model, model.steps(self._batch))
        logits = self._logits.setdefault(model, [])
        logits += [read(ids, mask) for ids, mask in self.taken[len(logits) :]]
        return logits[-1]


class _Tally:
    """The results of all steps of a graph, accumulated."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.cases: list[str] = []
        self._compared = self._equal = self._ties = 0
        self._first: str | None = None
        self._errors: dict[int, float] = {}
        self._passed = True

    def add(
        self,
        index: int,
        step: _Step,
        actual: Tensor,
        tolerance_check: ToleranceCheck,
        case: str,
        in_float64: _StepsInFloat64,
    ) -> None:
        """Count one step of every row."""
        expected = step.expected
        self._passed &= tolerance_check.accepts(f"{self._label}{case}, token {index}", expected, actual, in_float64)
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


def compare_encoder_decoder(run: TokenRun) -> TokenResult:
    """What an encoder-decoder's verification compares of its greedy tokens: that all are PyTorch's."""
    share = _equal_share(run)
    check = TensorCheck("greedy tokens", 1.0 - share, 1.0 - share, share)
    return TokenResult(share == 1.0, tensors=(check,))


def _equal_share(run: TokenRun) -> float:
    """The share of greedy tokens equal to PyTorch's, for the largest batch that starts with an empty cache.

    Both decode step by step with their caches, the export in the engine that `generate` and the service drive; PyTorch
    is fed the export's tokens.
    """
    steps = _QUICK_TOKENS if run.quick else _TOKENS
    empty = [case for _, case in run.cases if PAST in case and not case[PAST].get_seq_length()]
    case = max(empty, key=lambda case: len(case["decoder_input_ids"]))
    source = {name: value for name, value in case.items() if name not in ("decoder_input_ids", PAST)}
    tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    start = case["decoder_input_ids"][:, :1]
    generated = _tokens_of_export(run, tensors, start, steps)
    read = torch.cat([start, generated], dim=1)
    cache, equal = None, []
    for place in range(steps):
        with torch.no_grad():
            result = run.model(**source, decoder_input_ids=read[:, place : place + 1], past_key_values=cache)
        cache = returned_cache(result)
        equal.append(result.logits[:, -1].argmax(-1) == generated[:, place])
    return float(torch.cat(equal).float().mean())


def _tokens_of_export(run: TokenRun, source: Mapping[str, Tensor], start: Tensor, steps: int) -> Tensor:
    """The export's tokens after `start`, `[batch, 1]`, for what its encoder reads: `[batch, steps]`."""
    limits = DecoderLimits(None, steps, frozenset())
    generated: dict[int, list[int]] = {}
    with engine_errors("greedy tokens"):
        decoder = EncoderDecoder(run.session, run.adapters, limits, DecoderSize(len(start)), Encodings())
        last: dict[int, list[int]] = {}
        for row, token in enumerate(start):
            of_row = {name: value[row : row + 1] for name, value in source.items()}
            source_of_row = {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in of_row.items()}
            last[decoder.open(source=source_of_row)] = [int(token)]
        for _ in range(steps):
            last = {row: [int(logits.argmax())] for row, logits in decoder.step(last).items()}
            for row, tokens in last.items():
                generated.setdefault(row, []).extend(tokens)
    return torch.tensor([generated[row] for row in sorted(generated)])
