"""Inputs on which a float model is run to choose formats, and the measurements on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gralora_fx.core.graph.packed_weights import runnable
from gralora_fx.core.tracing.inputs.cache import empty_cache
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, first_line, option
from gralora_fx.exporters.artifact.tokenizer_files import loaded_tokenizer
from gralora_fx.exporters.kinds.conversion import Conversion, base_trace, is_streamed
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.quantize.kept_work import KeptWork, memory_for
from gralora_fx.exporters.quantize.sensitivity import Sensitivities, measure_sensitivities
from gralora_fx.exporters.translation.export_graphs import precision_of
from gralora_fx.exporters.verify.cases import Verification, random_answers
from gralora_fx.exporters.verify.comparable import evaluating, float32_model
from gralora_fx.exporters.verify.drawn_texts import drawn_to_choose
from gralora_fx.exporters.verify.given_texts import text_cases, user_texts
from gralora_fx.exporters.verify.outputs import step_inputs
from gralora_fx.format.input_names import PAST

_DRAWN, _FEWEST, _MOST = 32, 16, 48  # tokens of a sampled text; minimum and maximum number of texts
_TOGETHER = 512  # positions run at once, and approximate positions for measuring sensitivity
_LEAST_POSITIONS = 16
_TEXTS, _LONGEST = 256, 128  # maximum number of texts, and tokens of each

_MEASURED = "the measurements of what rounding costs"  # a kept result

_Row: TypeAlias = Mapping[str, Tensor]  # a text as inputs of one row


@dataclass(frozen=True)
class Calibration:
    """Measurements of a model."""

    model: TracedModel  # the float32 model
    cases: Sequence[Mapping[str, Any]] = ()  # inputs that it is run on
    measured: Sensitivities | None = None  # the measurements; None if there are none
    inputs: str = ""  # description of the inputs
    problem: str = ""  # why the effect of rounding on the outputs is unknown; empty if it is known


def calibrate(conversion: Conversion, verification: Verification) -> Calibration:
    """Run a model on inputs, and measure how its outputs depend on rounding."""
    given = _given(conversion.traced, conversion.options)  # raises errors in the texts before a copy is made
    traced, work = _runnable(conversion), conversion.work or KeptWork()
    with evaluating(conversion.model, traced):
        cases: list[Mapping[str, Any]] = []
        inputs = ""
        try:
            with memory_for("run the model on texts"):
                cases, inputs = _cases(traced, given, verification, conversion.options, work)
            with memory_for("measure what rounding costs"):
                return Calibration(traced, cases, _measured(traced, _some(cases), work), inputs)
        except (RuntimeError, NotImplementedError) as error:
            return Calibration(traced, cases, None, inputs, f"the model gives no gradients ({first_line(error)})")


def _measured(traced: TracedModel, cases: Sequence[Mapping[str, Any]], work: KeptWork) -> Sensitivities:
    known = work.read(_MEASURED)
    if known is not None:
        return Sensitivities.of(known)
    measured = measure_sensitivities(traced, cases, work.directory)
    work.keep(_MEASURED, measured.arrays())
    return measured


def _runnable(conversion: Conversion) -> TracedModel:
    """Return the adapter-free model in float32: itself, or a copy with its weights in memory or read one by one."""
    model, traced = conversion.model, conversion.traced
    if is_streamed(model):
        return dataclasses.replace(traced, graph_module=runnable(traced.graph_module))
    is_ready = traced is model or traced is base_trace(model)
    if is_ready and precision_of(traced.graph_module) == "fp32":
        return traced
    return float32_model(traced, "fp32")


def _given(traced: TracedModel, options: ExportOptions) -> list[_Row] | None:
    """Return the texts for choosing bits as single-row inputs; None if none are given."""
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
    traced: TracedModel,
    given: Sequence[_Row] | None,
    verification: Verification,
    options: ExportOptions,
    work: KeptWork,
) -> tuple[list[Mapping[str, Any]], str]:
    """Return inputs to run the model on, and their description."""
    is_decoder = traced.cache_layout is CacheLayout.DECODER
    if given is not None:
        batches = list(_batches(given))
        cases = [
            _step(traced, batch["input_ids"]) if is_decoder else {**traced.constants, **batch} for batch in batches
        ]
        return cases, f"{len(given)} of the given texts"
    if traced.cache_layout is CacheLayout.ENCODER_DECODER:
        return [case for _, case in random_answers(traced, seed=1)], "random inputs"
    if not is_decoder:
        return [case for _, case in verification.cases(traced, seed=1, quick=False)], verification.description
    rows = drawn_to_choose(traced, work, _DRAWN, _count(traced), is_compared=options.measures_quality)
    parts = torch.split(rows, max(1, _TOGETHER // rows.shape[1]))
    return [_step(traced, part) for part in parts], f"{len(rows)} texts of {rows.shape[1]} tokens that the model drew"


def _some(cases: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return a sample of many texts: mean squares need fewer than the products used for rounding."""
    positions = sum(case["input_ids"].numel() for case in cases if "input_ids" in case)
    return cases[:: max(1, positions // _TOGETHER)]


def _check_long(positions: int) -> None:
    if positions < _LEAST_POSITIONS:
        raise ExportError(
            f"{option(texts=...)} has too few tokens ({positions}) in the texts that choose bits (every second one); "
            f"give texts with {_LEAST_POSITIONS} at least, or leave them out"
        )


def _positions(row: _Row) -> int:
    return int(row["attention_mask"].sum()) if "attention_mask" in row else max(map(Tensor.numel, row.values()))


def _batches(rows: Sequence[_Row]) -> Iterator[_Row]:
    """Batch texts of equal length, since layers would read padding too."""

    def sizes(row: _Row) -> list[tuple[int, ...]]:
        return [tuple(value.shape) for value in row.values()]

    for _, group in groupby(sorted(rows, key=sizes), key=sizes):
        alike = list(group)
        count = max(1, _TOGETHER // _positions(alike[0]))
        for start in range(0, len(alike), count):
            part = alike[start : start + count]
            yield {name: torch.cat([row[name] for row in part]) for name in part[0]}


def _step(traced: TracedModel, ids: Tensor) -> Mapping[str, Any]:
    """Return a decoder's inputs for reading texts from their beginning."""
    inputs = step_inputs(ids, torch.ones_like(ids), traced.input_names)
    return {**traced.constants, **inputs, PAST: empty_cache(traced.example_inputs[PAST], len(ids))}


def _count(traced: TracedModel) -> int:
    """Return how many texts have as many tokens as the widest layer has inputs, within bounds."""
    widest = max((site.in_features for site in traced.sites if site.calls), default=0)
    return min(max(-(-widest // _DRAWN), _FEWEST), _MOST)
