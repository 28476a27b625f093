"""Figures of the effect of quantization on outputs and logits, and the float32 model they compare with."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError
from gralora_fx.exporters.kinds.conversion import base_trace, fold_adapters, is_streamed
from gralora_fx.exporters.translation.export_graphs import precision_of
from gralora_fx.exporters.verify.cases import Case
from gralora_fx.exporters.verify.comparable import evaluating, float32_model
from gralora_fx.exporters.verify.outputs import OutputComparison
from gralora_fx.format.quantized_weights import OutputQuality, Quality, TokenQuality

_TINY = 1e-30


@contextmanager
def float32_reference(model: TracedModel | GraloraModel) -> Iterator[TracedModel | GraloraModel]:
    """Yield the reference for quantization, in evaluation mode: the model, or its float32 version."""
    is_float32 = precision_of(base_trace(model).graph_module) == "fp32"
    reference = model if is_float32 else float32_model(fold_adapters(model), "fp32", streamed=is_streamed(model))
    with evaluating(model, reference):
        yield reference


def compare_outputs(comparison: OutputComparison, cases: Iterable[Case], inputs: str) -> Quality:
    """Compare an export's outputs with the float32 model's, except masked positions and caches."""
    tallies: dict[str, QualityTally] = {}
    for description, case in cases:
        expected, actual = comparison.both(case, description)
        for name, value in expected.items():
            if name.startswith("present.") or not value.is_floating_point() or value.ndim < 2:
                continue
            rows = _rows(name, value.float(), case), _rows(name, actual[name].float(), case)
            check_finite(name, description, value, actual[name])
            tally = tallies.setdefault(name, QualityTally())
            (tally.add_logits if _is_logits(name, value) else tally.add_vectors)(*rows)
    return Quality(inputs, tuple(tally.of_output(name) for name, tally in tallies.items() if tally.rows))


def _is_logits(name: str, value: Tensor) -> bool:
    """Return whether an output is logits over classes or positions; a regression's single value is not."""
    return "logits" in name and (name.endswith("_logits") or value.shape[-1] > 1)


def _rows(name: str, value: Tensor, case: Mapping[str, Any]) -> Tensor:
    """Return an output as rows `[rows, width]`, without masked positions."""
    mask = case.get("attention_mask")
    if mask is not None and (mask.ndim != 2 or "decoder_input_ids" in case):
        mask = None  # the mask is of other positions than the outputs
    if value.ndim == 2:
        if (
            mask is not None and name.endswith("_logits") and value.shape == mask.shape
        ):  # one logit per position: start or end of an answer
            value = value.masked_fill(~mask.bool(), float("-inf"))
    elif value.ndim == 3:
        is_text = mask is not None and value.shape[:2] == mask.shape
        value = value[mask.bool()] if mask is not None and is_text else value.flatten(0, 1)
    else:
        value = value.flatten(1)
    is_regression = value.shape[-1] == 1 and not _is_logits(name, value)
    return value.reshape(1, -1) if is_regression else value  # all values of a regression are one vector


@dataclass
class QualityTally:
    """Figures of an output, or of a decoder's next tokens, accumulated over all inputs."""

    rows: int = 0
    equal: int = 0
    change: float = 0.0
    divergence: float = 0.0
    cases: list[str] = field(default_factory=list)  # descriptions of prompts
    steps: list[bool] = field(default_factory=list)  # whether the token of each step was equal
    starts: list[int] = field(default_factory=list)  # the first step of each prompt
    cosines: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)  # relative to the size of the model's row

    def add_logits(self, expected: Tensor, actual: Tensor, *, is_text: bool = False) -> None:
        """Accumulate logits `[rows, width]`: the largest change of a probability, or for texts the divergence."""
        self.rows += expected.shape[0]
        if not expected.numel():
            return
        self.equal += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        if is_text:
            self.divergence += float(kl_divergence(expected, actual).sum())
        else:
            self.change = max(self.change, float((expected.softmax(-1) - actual.softmax(-1)).abs().max()))

    def add_vectors(self, expected: Tensor, actual: Tensor) -> None:
        """Accumulate vectors `[rows, width]`."""
        if expected.numel():
            self.rows += expected.shape[0]
            similarity = torch.cosine_similarity(_directions(expected), _directions(actual), dim=-1)
            is_same = (expected == actual).all(-1)  # zeros have no direction
            self.cosines.append(similarity.masked_fill(is_same, 1.0))
            errors = (expected - actual).double().norm(dim=-1) / expected.double().norm(dim=-1).clamp(min=_TINY)
            self.errors.append(errors.masked_fill(is_same, 0.0))

    def add_step(self, index: int, case: str, expected: Tensor, actual: Tensor, in_float64: object) -> None:
        """Accumulate the logits of a step, as `Tally` does."""
        check_finite("logits", f"{case}, token {index}", expected, actual)
        self.starts += [len(self.steps)] if index == 0 else []
        self.steps.append(bool(expected.argmax() == actual.argmax()))
        self.add_logits(expected, actual, is_text=True)

    def of_output(self, name: str) -> OutputQuality:
        """Return the figures of an output."""
        if not self.cosines:
            return OutputQuality(name, self.rows, self.equal / self.rows, self.change, None, None)
        cosines, error = torch.cat(self.cosines), float(torch.cat(self.errors).mean())
        return OutputQuality(name, self.rows, None, None, float(cosines.mean()), float(cosines.min()), error)

    def of_steps(self, adapter: str | None) -> TokenQuality:
        """Return the figures of all steps; every prompt has as many."""
        count = len(self.steps) // len(self.starts)
        rows = [self.steps[start : start + count] for start in self.starts]
        return self.of_tokens(adapter, [(*row, False).index(False) for row in rows], count)

    def of_tokens(self, adapter: str | None, equal_tokens: list[int], continued: int) -> TokenQuality:
        """Return the figures of next tokens."""
        median, share = float(statistics.median(equal_tokens)), self.equal / self.rows
        return TokenQuality(
            adapter, len(equal_tokens), self.rows, share, self.divergence / self.rows, continued, median
        )


def _directions(rows: Tensor) -> Tensor:
    """Return rows relative to their largest values, since `cosine_similarity` takes rows of less than 1e-8 as zeros."""
    return rows.double() / rows.double().abs().amax(-1, keepdim=True).clamp(min=_TINY)


def check_finite(name: str, where: str, expected: Tensor, actual: Tensor) -> None:
    """Check that an output is finite where the model's is."""
    if bool((expected.isfinite() & ~actual.isfinite()).any()):
        raise ExportError(
            f"the quantized export gives values of {name} that are not finite on {where}, and the model's are finite; "
            "export it without quantize"
        )


def kl_divergence(expected: Tensor, actual: Tensor) -> Tensor:
    """Return KL(p || q) of two sets of logits `[rows, vocabulary]`, in nats: `[rows]` float64, row by row."""
    found = []
    with np.errstate(invalid="ignore"):
        for pair in zip(expected.numpy(), actual.numpy(), strict=True):
            log_p, log_q = (_log_softmax(row.astype(np.float64)) for row in pair)
            p = np.exp(log_p)
            found.append(np.where(p > 0, p * (log_p - log_q), 0.0).sum())
    return torch.tensor(found, dtype=torch.double)


def _log_softmax(row: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = row - row.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
