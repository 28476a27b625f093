"""What quantization changes: a quantized export, as it is run, compared with the float32 model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.layouts import CacheLayout
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.artifact.companions import loaded_tokenizer
from gralora_fx.exporters.kinds.conversion import base_trace, fold_adapters
from gralora_fx.exporters.translation.cast_graph import precision_of
from gralora_fx.exporters.verify.cases import Case, Verification
from gralora_fx.exporters.verify.compared_tensors import check_finite
from gralora_fx.exporters.verify.fresh_inputs import random_answers, text_cases
from gralora_fx.exporters.verify.output_comparison import OutputComparison
from gralora_fx.exporters.verify.reference_models import evaluating, float32_model
from gralora_fx.exporters.verify.token_quality import drawn_texts, token_quality, user_texts
from gralora_fx.exporters.verify.variants import variants
from gralora_fx.format.manifest import read_manifest
from gralora_fx.format.quantized_weights import OutputQuality, Quality, TokenQuality
from gralora_fx.run.sessions.session import Runtime, open_session, yielding_options


def measure_quality(
    directory: Path,
    model: TracedModel | GraloraModel,
    verification: Verification,
    *,
    texts: Sequence[str] | None,
    tokenizer: Any,
) -> Quality:
    """Run a quantized export and the float32 model on the same inputs, both without adapters that are its data.

    Of a decoder's export that takes adapters as data, tokens are compared without one and with each active one.
    """
    traced, manifest = base_trace(model), read_manifest(directory)
    session = open_session(directory, Runtime(session_options=yielding_options()))
    states = variants(session, model, manifest, directory)
    if traced.cache_layout is CacheLayout.DECODER:
        chosen = drawn_texts(traced) if texts is None else user_texts(texts, loaded_tokenizer(tokenizer), traced)
        tokens: list[TokenQuality] = []
        for variant in states:
            with variant.active(), _float32(model) as reference:
                tokens.append(token_quality(variant.session, reference, chosen, variant.name))
        return Quality(str(chosen), (), tuple(tokens))
    base = next(states)  # without adapters that are data
    cases: Iterable[Case]
    if traced.cache_layout is CacheLayout.ENCODER_DECODER:
        cases, inputs = random_answers(traced, seed=0), "random inputs"
    elif texts is None:
        cases, inputs = verification.cases(traced, seed=0, quick=True), "random inputs"
    else:
        cases, inputs = text_cases(texts, tokenizer, traced), f"{len(texts)} given text{'s' * (len(texts) > 1)}"
    with base.active(), _float32(model) as reference:
        return compare_outputs(OutputComparison(base.session, reference, manifest.logits), cases, inputs)


@contextmanager
def _float32(model: TracedModel | GraloraModel) -> Iterator[TracedModel | GraloraModel]:
    """What quantization is measured by: the model itself, or one of half precision in float32 arithmetic.

    It is in evaluation mode within a block.
    """
    is_float32 = precision_of(base_trace(model).graph_module) == "fp32"
    reference = model if is_float32 else float32_model(fold_adapters(model), "fp32")
    with evaluating(model, reference):
        yield reference


def compare_outputs(comparison: OutputComparison, cases: Iterable[Case], inputs: str) -> Quality:
    """Compare the outputs of an export with those of the float32 model; what a mask hides and a cache are left out."""
    tallies: dict[str, _Tally] = {}
    for description, case in cases:
        expected, actual = comparison.both(case, description)
        for name, value in expected.items():
            if name.startswith("present.") or not value.is_floating_point() or value.ndim < 2:
                continue
            rows = _rows(name, value.float(), case), _rows(name, actual[name].float(), case)
            check_finite(name, description, value, actual[name])
            tallies.setdefault(name, _Tally(_is_logits(name, value))).add(*rows)
    return Quality(inputs, tuple(tally.result(name) for name, tally in tallies.items() if tally.rows))


def _is_logits(name: str, value: Tensor) -> bool:
    """Whether an output's last axis is classes, or positions of a text; a regression's single value is neither."""
    return "logits" in name and (name.endswith("_logits") or value.shape[-1] > 1)


def _rows(name: str, value: Tensor, case: Mapping[str, Any]) -> Tensor:
    """An output as rows `[rows, width]`, without the positions that a mask hides."""
    mask = case.get("attention_mask")
    if mask is not None and (mask.ndim != 2 or "decoder_input_ids" in case):
        mask = None  # of other positions than the outputs'
    if value.ndim == 2:
        if (
            mask is not None and name.endswith("_logits") and value.shape == mask.shape
        ):  # a logit a position: of an answer's start or end
            value = value.masked_fill(~mask.bool(), float("-inf"))
    elif value.ndim == 3:
        is_text = mask is not None and value.shape[:2] == mask.shape
        value = value[mask.bool()] if mask is not None and is_text else value.flatten(0, 1)
    else:
        value = value.flatten(1)
    is_regression = value.shape[-1] == 1 and not _is_logits(name, value)
    return value.reshape(1, -1) if is_regression else value  # all values of a regression are one vector


@dataclass
class _Tally:
    """Figures of an output over all inputs."""

    is_logits: bool
    rows: int = 0
    equal: int = 0
    change: float = 0.0
    cosines: list[Tensor] = field(default_factory=list)

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Count rows `[rows, width]`."""
        self.rows += expected.shape[0]
        if not expected.numel():
            return
        if self.is_logits:
            self.equal += int((expected.argmax(-1) == actual.argmax(-1)).sum())
            self.change = max(self.change, float((expected.softmax(-1) - actual.softmax(-1)).abs().max()))
            return
        similarity = torch.cosine_similarity(expected.double(), actual.double(), dim=-1)
        self.cosines.append(similarity.masked_fill((expected == actual).all(-1), 1.0))  # zeros have no direction

    def result(self, name: str) -> OutputQuality:
        if self.is_logits:
            return OutputQuality(name, self.rows, self.equal / self.rows, self.change, None, None)
        cosines = torch.cat(self.cosines)
        return OutputQuality(name, self.rows, None, None, float(cosines.mean()), float(cosines.min()))
