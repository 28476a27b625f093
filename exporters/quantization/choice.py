"""The choice of an int4 export's formats: 8 bits go where they save most, by measured error, within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.artifact.companions import loaded_tokenizer
from gralora_fx.exporters.conversion import Conversion, base_trace
from gralora_fx.exporters.fx_passes.cast_graph import precision_of
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantization.block_arrays import dequantize_blocks, quantize_blocks
from gralora_fx.exporters.quantization.block_search import BlockArrays
from gralora_fx.exporters.quantization.formats import Blocks, Columns
from gralora_fx.exporters.quantization.plan import QuantizationPlan, weight_names
from gralora_fx.exporters.quantization.row_errors import plan_rows
from gralora_fx.exporters.quantization.sensitivity import Sensitivities, measure_sensitivities
from gralora_fx.exporters.quantization.sequential import round_in_order
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.exporters.verification.compared_tensors import step_inputs
from gralora_fx.exporters.verification.fresh_inputs import text_cases
from gralora_fx.exporters.verification.greedy_tokens import ModelSteps
from gralora_fx.exporters.verification.reference_models import evaluating, float32_model
from gralora_fx.exporters.verification.token_quality import draw_tokens, drawn_texts, user_texts
from gralora_fx.graph.sites import LinearSite, other_readers
from gralora_fx.sources.lazy_tensors import values_of
from gralora_fx.tracing.inputs.cache import PAST, CacheLayout, empty_cache
from gralora_fx.tracing.traced_model import TracedModel

_DRAWN, _FEW, _MANY = 64, 16, 64  # tokens of a text that the model draws; texts that measure; that round too
_TOGETHER = 4  # texts that are run at once
_ROWS = 1024  # output features of a matrix whose errors stand for all
# Blocks of eight bits, which lose little with fewer scales. By those of 128 ONNX Runtime multiplies one row with other
# last digits than several, so that a token would depend on how many are read with it.
_WIDER = (64,)
_LEAST_POSITIONS = 16
_TEXTS, _LONGEST = 256, 128  # the most texts that are run, and tokens of each

_Row: TypeAlias = Mapping[str, Tensor]  # a text as inputs of one row


@dataclass(frozen=True)
class _Candidate:
    """A matrix that can have more bits.

    Attributes:
        names: Names of the parameter.
        values: Number of its values.
        form: The format with more bits.
        gain: How much less is lost in it.
        loss: What is lost in four bits.
        relative: The squared error of the weights in four bits, relative to their squares.
        is_measured: Whether losses are divergences of the outputs; else they are relative errors.
    """

    names: tuple[str, ...]
    values: int
    form: Blocks
    gain: float
    loss: float
    relative: float
    is_measured: bool


def choose_formats(conversion: Conversion, verification: Verification) -> QuantizationPlan | None:
    """The plan of an export: for int4 by measured error, for other kinds of quantization as it is.

    Each layer's rounding error is weighed by what it costs the model's outputs (see `sensitivity`); 8 bits go to the
    layers where they save most for each bit more, until the mean reaches the budget. The float model is run on every
    second of a user's texts, on texts that a decoder draws itself, or on random inputs of other models. A streamed
    model cannot be run: there the relative errors of the weights themselves count, as for layers that were not measured
    in others.

    Args:
        conversion: What is converted.
        verification: Gives inputs of models that draw no texts.

    Raises:
        ExportError: The texts are too short, or do not fit the model, or it is streamed; or a weight is not finite.
    """
    plan, options = conversion.plan, conversion.options
    if plan is not None and isinstance(plan.default, Columns):
        return _with_rows(plan, conversion, verification)
    if plan is None or not isinstance(plan.default, Blocks) or plan.default.bits != 4:
        return plan
    traced = conversion.traced
    run, measured, chosen_by = _measured(conversion, verification)
    wider = _WIDER if options.block_size is None else ()
    names = {site.path: weight_names(traced, site) for site in traced.sites}
    sites = list({id(site.weight): site for site in traced.sites if site.calls}.values())
    tied = other_readers(traced.graph_module, sites)
    candidates = [
        _candidate(
            site,
            names[site.path],
            plan.default,
            measured,
            [size for size in wider if not site.in_features % size or not tied[site.path]],  # rows of whole blocks
        )
        for site in sites
    ]
    taken = _within(_comparable(candidates), options.mean_bits)
    own = {name: one.form for one in taken for name in one.names}
    gains = {name: one.gain for one in taken for name in one.names}
    try:
        rounded = {} if run is None or not run.cases else _rounded(conversion, run, plan.default, own, names)
    except (RuntimeError, NotImplementedError) as error:
        rounded, chosen_by = {}, f"{chosen_by}; weights rounded for inputs that count alike ({first_line(error)})"
    return QuantizationPlan(plan.default, own, gains, chosen_by, rounded)


def _rounded(
    conversion: Conversion,
    run: _Run,
    default: Blocks,
    own: Mapping[str, Blocks],
    names: Mapping[str, tuple[str, ...]],
) -> dict[str, BlockArrays]:
    """Blocks of the weights whose rounding is searched, by all names of each, which are given by the layers' paths."""
    chosen = {path: (of[0], own.get(of[0], default)) for path, of in names.items()}
    forms = {path: one for path, one in chosen.items() if one[1].rounding == "searched"}
    with evaluating(conversion.model, run.model):
        blocks = round_in_order(run.model, run.cases, forms)
    return {name: arrays for path, arrays in blocks.items() for name in names[path]}


def _with_rows(plan: QuantizationPlan, conversion: Conversion, verification: Verification) -> QuantizationPlan:
    """The plan of an export whose activations are rounded; without figures where the model cannot be run."""
    if _is_streamed(conversion):
        return dataclasses.replace(plan, chosen_by="nothing, as a streamed model is not run")
    traced = _runnable(conversion)
    with evaluating(conversion.model, traced):
        try:
            cases, inputs = _cases(traced, None, verification, _FEW)
            return plan_rows(plan, traced, cases, inputs)
        except (RuntimeError, NotImplementedError) as error:
            return dataclasses.replace(plan, chosen_by=f"nothing, as the model was not measured ({first_line(error)})")


def _is_streamed(conversion: Conversion) -> bool:
    return any(parameter.is_meta for parameter in base_trace(conversion.model).tree.parameters.values())


def _runnable(conversion: Conversion) -> TracedModel:
    """The adapter-free model in float32, its weights in memory: itself, or a copy."""
    model, traced = conversion.model, conversion.traced
    is_ready = traced is model or traced is base_trace(model)
    if is_ready and precision_of(traced.graph_module) == "fp32":
        return traced
    return float32_model(traced, "fp32")


def _comparable(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Those not measured with gains as of the others: a relative error costs what it costs there in the median."""
    costs = [one.loss / one.relative for one in candidates if one.is_measured and one.relative > 0]
    cost = float(np.median(costs)) if costs else 1.0
    return [one if one.is_measured else dataclasses.replace(one, gain=cost * one.gain) for one in candidates]


def _within(candidates: Sequence[_Candidate], bits: float) -> list[_Candidate]:
    """Those that save most for each bit more, as many as the mean number of bits allows."""
    room = (bits - 4) * sum(one.values for one in candidates)
    taken = []
    for one in sorted(candidates, key=lambda one: one.gain / one.values, reverse=True):
        cost = one.values * (one.form.bits - 4)
        if one.gain > 0 and cost <= room:
            taken.append(one)
            room -= cost
    return taken


def _candidate(
    site: LinearSite, names: tuple[str, ...], form: Blocks, measured: Sensitivities | None, wider: Sequence[int]
) -> _Candidate:
    """What eight bits would save at a layer: the widest blocks that lose at most a hundredth more than narrow ones."""
    weight = values_of(site.weight, names[0]).detach().float()
    matrix = weight.t() if site.kind == "conv1d" else weight  # [out, in]
    rows = torch.arange(0, len(matrix), max(1, len(matrix) // _ROWS))
    sample = np.ascontiguousarray(matrix[rows].numpy())
    known = measured if measured is not None and measured.has_gradients(site.path) else None
    layer = None if known is None else known.layers.get(site.path)
    squares = None if layer is None or not layer.reads else layer.squares

    def losses(of: Blocks) -> tuple[float, float]:
        blocks = quantize_blocks(np.ascontiguousarray(sample.T), of, squares, names[0])
        change = dequantize_blocks(blocks, of.bits, sample.shape[1]) - sample
        error = float(np.square(change).sum() / max(np.square(sample).sum(), 1e-30))
        return error if known is None else known.loss(site.path, torch.from_numpy(change), rows), error

    four, relative = losses(form)
    best = narrow = dataclasses.replace(form, bits=8, rounding="nearest")
    least = losses(narrow)[0]
    for size in wider:
        other = dataclasses.replace(narrow, block_size=size)
        if size > form.block_size and site.in_features >= size and (found := losses(other)[0]) <= least + four / 100:
            best, least = other, found
            break
    return _Candidate(names, site.weight.numel(), best, four - least, four, relative, known is not None)


@dataclass(frozen=True)
class _Run:
    """A float32 model in memory, and inputs that it is run on."""

    model: TracedModel
    cases: Sequence[Mapping[str, Any]]


def _measured(conversion: Conversion, verification: Verification) -> tuple[_Run | None, Sensitivities | None, str]:
    """What was run, what rounding costs the model, and what it was measured on."""
    if _is_streamed(conversion):
        if conversion.options.choosing_texts is not None:
            raise ExportError(
                "texts=... choose bits by what the model computes of them, and a streamed model is not run: leave them "
                "out, or load the model whole"
            )
        return None, None, "the errors of the weights themselves, as a streamed model is not run"
    given = _given(conversion.traced, conversion.options)  # what is wrong with them is said before a copy is made
    traced = _runnable(conversion)
    with evaluating(conversion.model, traced):
        cases: list[Mapping[str, Any]] = []
        try:
            cases, inputs = _cases(traced, given, verification, _MANY)
            is_drawn = given is None and traced.cache_layout is CacheLayout.DECODER
            few = cases[: _FEW // _TOGETHER] if is_drawn else cases
            return _Run(traced, cases), measure_sensitivities(traced, few), inputs
        except (RuntimeError, NotImplementedError) as error:
            reason = f"the errors of the weights themselves, as the model gives no gradients ({first_line(error)})"
        try:
            measured = measure_sensitivities(traced, cases, gradients=False) if cases else None
            return _Run(traced, cases), measured, reason
        except (RuntimeError, NotImplementedError):
            return None, None, reason


def _given(traced: TracedModel, options: ExportOptions) -> list[_Row] | None:
    """The texts that choose bits as inputs of one row each; None where none are given."""
    texts = options.choosing_texts
    if texts is None:
        return None
    texts = texts[:: max(1, -(-len(texts) // _TEXTS))]
    if traced.cache_layout is CacheLayout.DECODER:
        read = user_texts(texts, loaded_tokenizer(options.tokenizer), traced).rows
        rows: list[_Row] = [{"input_ids": torch.tensor([row])} for row in read]
    else:
        cases = text_cases(texts, options.tokenizer, traced, batch=1, longest=_LONGEST)
        rows = [{name: value for name, value in case.items() if name not in traced.constants} for _, case in cases]
    _check_long(sum(map(_positions, rows)))
    return rows


def _cases(
    traced: TracedModel, given: Sequence[_Row] | None, verification: Verification, count: int
) -> tuple[list[Mapping[str, Any]], str]:
    """Inputs on which the model is run, and what measures: of the texts that a decoder draws, the first sixteen."""
    is_decoder = traced.cache_layout is CacheLayout.DECODER
    if given is not None:
        batches = list(_batches(given))
        cases = [
            _step(traced, batch["input_ids"]) if is_decoder else {**traced.constants, **batch} for batch in batches
        ]
        return cases, f"{len(given)} of the given texts"
    if not is_decoder:
        return [case for _, case in verification.cases(traced, seed=1, quick=False)], "random inputs"
    rows = _drawn(traced, count)
    return [_step(traced, part) for part in torch.split(rows, _TOGETHER)], (
        f"{_FEW} texts of {rows.shape[1]} tokens that the model drew"
    )


def _check_long(positions: int) -> None:
    if positions < _LEAST_POSITIONS:
        raise ExportError(
            f"texts=... has {positions} tokens in every second text, by which int4 chooses bits, and they are too few: "
            f"give texts with {_LEAST_POSITIONS} at least, or leave them out"
        )


def _positions(row: _Row) -> int:
    return int(row["attention_mask"].sum()) if "attention_mask" in row else max(map(Tensor.numel, row.values()))


def _batches(rows: Sequence[_Row]) -> Iterator[_Row]:
    """Texts of one length together, some at a time: padding would count as what layers read."""

    def sizes(row: _Row) -> list[tuple[int, ...]]:
        return [tuple(value.shape) for value in row.values()]

    for _, group in groupby(sorted(rows, key=sizes), key=sizes):
        alike = list(group)
        for start in range(0, len(alike), _TOGETHER):
            part = alike[start : start + _TOGETHER]
            yield {name: torch.cat([row[name] for row in part]) for name in part[0]}


def _step(traced: TracedModel, ids: Tensor) -> Mapping[str, Any]:
    """What a decoder takes to read texts from their beginning."""
    inputs = step_inputs(ids, torch.ones_like(ids), traced.input_names)
    return {**traced.constants, **inputs, PAST: empty_cache(traced.example_inputs[PAST], len(ids))}


@torch.no_grad()
def _drawn(traced: TracedModel, count: int) -> Tensor:
    """Texts that the model draws, `[texts, length]`; others than those on which an export is compared."""
    texts = drawn_texts(traced, 1, _DRAWN, count)
    ids = torch.tensor(texts.rows)
    steps, generator = ModelSteps(traced, len(ids)), torch.Generator().manual_seed(1)
    for length in range(1, texts.drawn + 1):
        logits = steps(ids[:, -1:], torch.ones(len(ids), length, dtype=torch.long))[:, -1]
        ids = torch.cat([ids, draw_tokens(logits.float(), texts.end, generator)[:, None]], dim=1)
    return ids
