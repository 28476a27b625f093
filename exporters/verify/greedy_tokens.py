"""Comparison of an export's greedy tokens with the model's, step by step, each with its own cache.

`model.onnx` is run as other programs run it: a batch with a mask. Graphs with row lengths and encoder-decoders are run
by the engine's decoders, as they are served.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gralora_fx.base.progress.stages import counting
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cache import empty_cache, returned_cache
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, ServingError, marked
from gralora_fx.exporters.kinds.conversion import base_trace
from gralora_fx.exporters.verify.cases import PromptBatch, TokenResult, TokenRun
from gralora_fx.exporters.verify.outputs import last_logits, run_model, step_inputs
from gralora_fx.exporters.verify.tolerances import Tally, ToleranceCheck
from gralora_fx.exporters.verify_report import TokenCheck
from gralora_fx.format.input_names import PAST
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.run.engine.session_decoders import RowsDecoder
from gralora_fx.run.sessions.ort_values import as_tensor, empty_values, run_values
from gralora_fx.run.sessions.session_views import as_past

if TYPE_CHECKING:  # loaded where a difference is above the tolerance
    from gralora_fx.exporters.verify.float64_model import Float64Model

# from new ids `[batch, new]` and the mask `[batch, all]` of earlier and new positions, 0 at padding, to logits of all
# new positions, `[batch, new, vocabulary]`, or of the last one
Step = Callable[[Tensor, Tensor], Tensor]
Reader = Callable[[PromptBatch], Step]  # from prompts to their reader
_BYSTANDER = (0, 0, 0)  # tokens of the row that is idle from then on; every vocabulary has this token


class DecoderSteps:
    """A `Step` of `model.onnx`, with the cache of its earlier steps."""

    def __init__(self, session: Any, batch: int, description: str = "a step") -> None:
        """Start with an empty cache."""
        self._session, self._description = session, description
        self._names = {value.name for value in session.get_inputs()}
        self._cache = empty_values(session, batch)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens."""
        inputs = step_inputs(ids, mask, self._names)
        results = run_values(self._session, {**inputs, **self._cache}, self._description)
        self._cache = as_past(results)
        return as_tensor(results["logits"])


class ModelSteps:
    """A `Step` of a traced decoder, with the cache of its earlier steps."""

    def __init__(
        self,
        model: TracedModel | GraloraModel,
        batch: int,
        description: str = "a step",
        run: Callable[..., Any] | None = None,
    ) -> None:
        """Start with an empty cache; `run` is called instead of the model."""
        self._traced, self._run = base_trace(model), run or partial(run_model, model, description)
        self._cache: Any = empty_cache(self._traced.example_inputs[PAST], batch)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens."""
        inputs = step_inputs(ids, mask, self._traced.input_names)
        outputs = self._run(**self._traced.constants, **inputs, past_key_values=self._cache)
        self._cache = returned_cache(outputs)
        logits: Tensor = outputs["logits"]
        return logits


class EngineSteps:
    """A `Step` of an engine's decoder rows, as they are served: masked positions are left out."""

    def __init__(self, decoder: Decoder, rows: Sequence[int], description: str) -> None:
        """Use rows that are open."""
        self._decoder, self._rows, self._description = decoder, rows, description

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read new tokens; return the logits after each row's last token, `[batch, 1, vocabulary]`."""
        is_new = mask[:, -ids.shape[1] :].bool()
        logits = self._read([row[new].tolist() for row, new in zip(ids, is_new, strict=True)])
        return torch.stack([torch.from_numpy(array)[None] for array in logits])

    def _read(self, tokens: Sequence[list[int]]) -> list[Any]:
        """Let every row read its tokens."""
        logits = self._step(dict(zip(self._rows, tokens, strict=True)))
        return [logits[row] for row in self._rows]

    def _step(self, tokens: Mapping[int, list[int]]) -> dict[int, Any]:
        with engine_errors(self._description):
            logits = self._decoder.step(tokens)
        return {row: array[-1] if self._decoder.gives_all else array for row, array in logits.items()}


class RowSteps(EngineSteps):
    """Rows of different lengths, each beside a copy of itself with another adapter; one more row is always idle.

    Some rows read their new tokens at once, some in two chunks, some are idle first. The cache of an idle row must not
    change, bit for bit.
    """

    _decoder: RowsDecoder

    def __init__(
        self, session: Any, adapters: Adapters, name: str | None, others: Sequence[str | None], prompts: PromptBatch
    ) -> None:
        """Open the rows, with room for prompts and the tokens after them."""
        count, length = prompts.ids.shape[0], prompts.ids.shape[1] + prompts.steps
        limits = DecoderLimits(None, max(length, len(_BYSTANDER)), frozenset())
        with engine_errors(prompts.description):
            decoder = RowsDecoder(session, adapters, limits, DecoderSize(2 * count + 1, chunk=limits.context))
            names = self.adapters(name, others, count)
            # the idle row is between others, since a step runs all rows from the first to the last that read
            first, self._idle, *rest = [decoder.open(name, start=0) for name in (names[0], name, *names[1:])]
            decoder.step({self._idle: _BYSTANDER})
        super().__init__(decoder, [first, *rest], prompts.description)

    @staticmethod
    def adapters(name: str | None, others: Sequence[str | None], rows: int) -> list[str | None]:
        """Return the adapter of every row, then of its copy, cycling through the others."""
        return [adapter for row in range(rows) for adapter in (name, others[row % len(others)])]

    def _read(self, tokens: Sequence[list[int]]) -> list[Any]:
        logits: dict[int, Any] = {}
        for index, row in enumerate(self._rows):
            self._decoder.expect(row, len(tokens[index // 2]))
        for part in range(2):
            chunks = {row: _chunk(tokens[index // 2], index, part) for index, row in enumerate(self._rows)}
            logits |= self._step({row: chunk for row, chunk in chunks.items() if chunk})
        return [logits[row] for row in self._rows[::2]]

    def _step(self, tokens: Mapping[int, list[int]]) -> dict[int, Any]:
        idle = [row for row in (*self._rows, self._idle) if row not in tokens]
        before = [{name: value.copy() for name, value in self._decoder.cached(row).items()} for row in idle]
        logits = super()._step(tokens)
        for row, own in zip(idle, before, strict=True):
            now = self._decoder.cached(row)
            if changed := [name for name, value in own.items() if not np.array_equal(now[name], value)]:
                raise ExportError(f"a step changes {changed[0]} of a row that reads nothing; export the model again")
        return logits


def _chunk(tokens: list[int], row: int, part: int) -> list[int]:
    """Return a row's new tokens for the first or second step; two tokens are not split (see `PromptClamp`)."""
    half = len(tokens) // 2 if len(tokens) > 2 else 0
    first = (len(tokens), half, 0)[row % 3]
    return tokens[first:] if part else tokens[:first]


@contextmanager
def engine_errors(case: str) -> Iterator[None]:
    """Convert the engine's errors to verification errors."""
    try:
        yield
    except ServingError as error:
        raise ExportError(f"{marked(error)} ({case})") from error


class GreedyStep(NamedTuple):
    """The model's last logits, `[batch, vocabulary]`, and the new tokens and the mask that it read (see `Step`)."""

    logits: Tensor
    ids: Tensor
    mask: Tensor

    def read_by(self, read: Step) -> Tensor:
        """Return another graph's last logits after the same tokens, `[batch, vocabulary]`."""
        return _last(read, self.ids, self.mask)


def greedy_steps(read: Step, ids: Tensor, mask: Tensor, count: int) -> Iterator[GreedyStep]:
    """Run the model on tokens (see `Step`), then on its likeliest."""
    for _ in range(count):
        logits = _last(read, ids, mask)
        yield GreedyStep(logits, ids, mask)
        ids = logits.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


def _last(read: Step, ids: Tensor, mask: Tensor) -> Tensor:
    logits = read(ids, mask).float()
    return (logits if logits.shape[1] < ids.shape[1] else last_logits(logits, mask))[:, -1]


def compare_decoder(run: TokenRun) -> TokenResult:
    """Compare a decoder's tokens after every prompt."""
    if not run.prompts:  # the context is too short for any
        return TokenResult()
    readers: dict[str, Reader] = {"": reader(run.session)}
    if run.rows is not None:
        readers["rows: "] = run.rows
    tokens, *rows = compare_greedy(readers, run.model, run.prompts, run.tolerance_check)
    passed = all(check.passed for check in (tokens, *rows))
    return TokenResult(passed, tokens, rows=rows[0] if rows else None)


def reader(session: Any) -> Reader:
    """Return a function that starts reading prompts with a session over `model.onnx`."""
    return lambda prompts: DecoderSteps(session, prompts.ids.shape[0], prompts.description)


def compare_greedy(
    readers: Mapping[str, Reader],
    model: TracedModel | GraloraModel,
    cases: Collection[PromptBatch],
    tolerance_check: ToleranceCheck,
) -> list[TokenCheck]:
    """Compare logits and likeliest tokens of several graphs with one run of the model; all continue with its tokens.

    The model reads all steps of a case first, then each graph, so that sessions can take turns (see `in_turn`). Only
    the first graph runs on right-padded prompts: graphs with row lengths have no padding.
    """
    tallies = {label: Tally(tolerance_check, label) for label in readers}
    done = itertools.count(1)
    with counting("comparing tokens", sum(prompts.steps for prompts in cases), "tokens") as count:
        for prompts in cases:
            case, batch = prompts.description, prompts.ids.shape[0]
            steps: list[GreedyStep] = []
            for step in greedy_steps(ModelSteps(model, batch, case), prompts.ids, prompts.mask, prompts.steps):
                steps.append(step)
                count(next(done))
            in_float64 = _StepsInFloat64(model, batch, steps)
            for label in list(readers) if prompts.mask[:, -1].all() else list(readers)[:1]:
                tallies[label].cases.append(case)
                read = readers[label](prompts)
                for index, step in enumerate(steps):
                    tallies[label].add_step(index, case, step.logits, step.read_by(read), partial(in_float64, index))
    return [tally.tokens for tally in tallies.values()]


class _StepsInFloat64:
    """A batch's steps in float64, each model with its own cache; run only when needed.

    Some models compute a single token differently from one of several (see `PromptClamp`), so a run on the whole text
    cannot be the reference for steps.
    """

    def __init__(self, model: TracedModel | GraloraModel, batch: int, steps: Sequence[GreedyStep]) -> None:
        self._begin, self._steps = partial(ModelSteps, model, batch), steps
        self._read: dict[Float64Model, Step] = {}
        self._logits: dict[Float64Model, list[Tensor]] = {}

    def __call__(self, index: int, model: Float64Model) -> Tensor:
        """Run the steps up to one; return its last logits, `[batch, vocabulary]`."""
        read = self._read.setdefault(model, self._begin(run=model))
        logits = self._logits.setdefault(model, [])
        for step in self._steps[len(logits) : index + 1]:
            logits.append(last_logits(read(step.ids, step.mask), step.mask)[:, -1])
        return logits[index]
