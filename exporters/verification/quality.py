"""What quantization changes: a quantized export, as it is run, compared with the float32 model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.exporters.conversion import base_trace, fold_adapters
from gralora_fx.exporters.fx_passes.cast_graph import precision_of
from gralora_fx.exporters.verification.adapter_variants import variants
from gralora_fx.exporters.verification.cases import Case, Verification
from gralora_fx.exporters.verification.dequantized_model import dequantized_model
from gralora_fx.exporters.verification.evaluating import evaluating
from gralora_fx.exporters.verification.finite import check_finite
from gralora_fx.exporters.verification.float64_reference import ToleranceCheck
from gralora_fx.exporters.verification.outputs import OutputComparison
from gralora_fx.exporters.verification.texts import text_cases, text_tokenizer
from gralora_fx.exporters.verification.token_quality import token_quality
from gralora_fx.exporters.verification.token_texts import drawn_texts, given_texts
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.manifest import read_manifest
from gralora_fx.runtime.quantized_weights import OutputQuality, Quality, TokenQuality
from gralora_fx.runtime.session import open_session
from gralora_fx.tracing.inputs.decoder_cache import CacheLayout
from gralora_fx.tracing.traced_model import TracedModel


def float32_model(model: TracedModel | GraloraModel) -> TracedModel | GraloraModel:
    """The model that quantization is measured by: the model itself, or one of half precision in float32 arithmetic."""
    if precision_of(base_trace(model).graph_module) == "fp32":
        return model
    return dequantized_model(fold_adapters(model), "fp32")


def measure_quality(
    directory: Path,
    model: TracedModel | GraloraModel,
    verification: Verification,
    *,
    logits: str,
    texts: Sequence[str] | None,
    tokenizer: Any,
) -> Quality:
    """Run a quantized export and the float32 model on the same inputs, both without adapters that are its data.

    Args:
        directory: The export directory.
        model: The model that was exported.
        verification: What is compared of this kind of export.
        logits: Which positions' logits the export gives: `"last"` or `"all"`.
        texts: A user's texts; None for texts that a decoder with a cache draws itself, and for the random inputs of a
            quick verification of other models.
        tokenizer: For texts: a tokenizer, or the directory of one.

    Raises:
        ExportError: The texts do not fit the model, the model or the export cannot run, or the export gives values that
            are not finite where the model's are.
    """
    if base_trace(model).cache_layout is CacheLayout.DECODER:
        return _measure_tokens(directory, model, texts, tokenizer)
    traced, manifest = base_trace(model), read_manifest(directory)
    base = next(variants(open_session(directory), model, manifest, directory))  # without adapters that are data
    with base.active():
        reference = float32_model(model)
        check = ToleranceCheck(reference, 0.0, use_float64=False)
        comparison = OutputComparison(base.session, reference, verification, logits, check)
        with evaluating(model, reference):
            if texts is None:
                return compare_outputs(comparison, verification.cases(traced, seed=0, quick=True), "random inputs")
            plural = "s" if len(texts) > 1 else ""
            return compare_outputs(comparison, text_cases(texts, tokenizer, traced), f"{len(texts)} given text{plural}")


def _measure_tokens(
    directory: Path, model: TracedModel | GraloraModel, texts: Sequence[str] | None, tokenizer: Any
) -> Quality:
    """Compare a decoder's tokens; of an export that takes adapters as data, without one and with each active one."""
    traced = base_trace(model)
    chosen = drawn_texts(traced) if texts is None else given_texts(texts, text_tokenizer(tokenizer), traced)
    found: list[TokenQuality] = []
    for variant in variants(open_session(directory), model, read_manifest(directory), directory):
        with variant.active():
            reference = float32_model(model)
            with evaluating(model, reference):
                found.append(token_quality(variant.session, reference, chosen, variant.name))
    return Quality(str(chosen), (), tuple(found))


def compare_outputs(comparison: OutputComparison, cases: Iterable[Case], inputs: str) -> Quality:
    """Compare the outputs of an export with those of the float32 model; what a mask hides and a cache are left out.

    Args:
        comparison: The export as it is run, and the float32 model in evaluation mode.
        cases: The inputs.
        inputs: What they are, for the report.

    Raises:
        ExportError: The model or the export cannot run, or the export gives values that are not finite where the
            model's are.
    """
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
