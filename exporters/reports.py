"""Reports of an export and its verification."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gralora_fx.graph.pipeline import PassLog, PassReport, Skip
from gralora_fx.runtime.adapter_inputs import AdapterInputs
from gralora_fx.runtime.export_directory import ROWS_NAME
from gralora_fx.runtime.manifest import RowsEntry
from gralora_fx.runtime.placement import describe_placement
from gralora_fx.runtime.quantized_weights import Quality, QuantizedWeights
from gralora_fx.sources.paths import written_lines


@dataclass(frozen=True)
class TensorCheck:
    """How one output of ONNX Runtime compares with PyTorch's, over all cases.

    Attributes:
        name: Name of the output.
        max_abs_error: Largest difference of a value.
        max_rel_error: The same, relative to PyTorch's largest value in that case.
        argmax_agreement: Share of rows whose largest value has the same index, or None for other outputs.
    """

    name: str
    max_abs_error: float
    max_rel_error: float
    argmax_agreement: float | None


@dataclass(frozen=True)
class TokenCheck:
    """How the greedy tokens of an export compare with PyTorch's; both continue with PyTorch's token.

    Attributes:
        cases: The prompts.
        compared: How many tokens were compared.
        equal: How many are equal.
        near_ties: How many differ where PyTorch's logits of the two tokens are within the tolerance.
        first_difference: Where the first token differs, or None.
        step_errors: Largest difference of the last position's logits at each step, that of the prompt first, relative
            to the largest logit or to 1 where that is smaller.
        passed: Whether the logits of every step are close enough.
    """

    cases: tuple[str, ...]
    compared: int
    equal: int
    near_ties: int
    first_difference: str | None
    step_errors: tuple[float, ...]
    passed: bool = True

    @property
    def agreement(self) -> float:
        """Share of equal tokens."""
        return self.equal / self.compared if self.compared else 1.0

    def __str__(self) -> str:
        """The tokens, the logits by step, and where they differ first."""
        largest = max(self.step_errors, default=0.0)
        lines = [
            f"greedy tokens: {self.equal} of {self.compared} equal ({100 * self.agreement:.1f} %), "
            f"{self.near_ties} near ties; {len(self.cases)} cases ({'; '.join(self.cases)})",
            f"logits by step, largest {largest:.1e}: {' '.join(f'{error:.0e}' for error in self.step_errors)}",
        ]
        return "\n".join([*lines, f"first difference: {self.first_difference}"] if self.first_difference else lines)


@dataclass(frozen=True)
class RoundingCheck:
    """A difference above the tolerance, compared with the rounding error of float32 itself.

    Attributes:
        where: The case and the output or token.
        difference: Difference of the export from PyTorch, relative to the largest value, or to 1 if that is smaller.
        rounding: The rounding error of float32 there, likewise (see `tolerances`); 0 if it could not be
            determined.
        why_not: Why it could not be determined.
    """

    where: str
    difference: float
    rounding: float
    why_not: str = ""

    def __str__(self) -> str:
        """Both numbers."""
        return f"{self.where}: {self.difference:.1e}, {self.why_not or f'float32 itself rounds {self.rounding:.1e}'}"


@dataclass(frozen=True)
class ProviderRun:
    """The execution provider that an export was run on.

    Attributes:
        name: The provider.
        version: Its version; for one that is part of ONNX Runtime, ONNX Runtime's.
        device: The device, as far as it is known.
        nodes: How many nodes of each operator every provider ran; empty where the CPU is alone.
    """

    name: str
    version: str
    device: str
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """The provider with version and device, and the nodes that each provider ran."""
        device = f" on {self.device}" if self.device else ""
        nodes = f"; nodes: {describe_placement(self.nodes)}" if self.nodes else ""
        return f"{self.name} {self.version}{device}{nodes}"


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify_onnx`.

    Attributes:
        passed: Whether every output is close enough in every case, and the logits of every greedy step: within the
            tolerance, or no more than four times as far off as float32 itself is from float64.
        tolerance: Largest difference allowed, relative to the largest value or to `least_scale` where that is smaller.
        cases: The inputs that were compared.
        tensors: One entry for each output.
        tokens: Greedy tokens, for an export that generates.
        weights: Precision of the export's weights, such as `fp16` or `int4`.
        arithmetic: Precision in which it was run.
        rounding: The differences above the tolerance, which were compared with a float64 run.
        level: `"quick"` or `"full"`: how many inputs were compared.
        reference: What the export was compared with.
        provider: Where it was run, if a provider was asked for; None for the CPU provider.
        least_scale: The least value that a difference is relative to: 1, or less for a provider whose arithmetic is
            less exact than float32.
        adapters: Of an export that takes adapters as data, the comparison with each; the rest is that of the base.
        rows: Greedy tokens of a decoder's graph whose rows have lengths of their own, all adapters in one batch; None
            where there is none, or it was not compared.
    """

    passed: bool
    tolerance: float
    cases: tuple[str, ...]
    tensors: tuple[TensorCheck, ...]
    tokens: TokenCheck | None = None
    weights: str = "fp32"
    arithmetic: str = "fp32"
    rounding: tuple[RoundingCheck, ...] = ()
    level: str = "full"
    reference: str = "the PyTorch model"
    provider: ProviderRun | None = None
    least_scale: float = 1.0
    adapters: Mapping[str, VerifyReport] = field(default_factory=dict)
    rows: TokenCheck | None = None

    @property
    def max_abs_error(self) -> float:
        """Largest difference of any value."""
        others = (report.max_abs_error for report in self.adapters.values())
        return max((*(tensor.max_abs_error for tensor in self.tensors), *others), default=0.0)

    def with_adapter(self, name: str, report: VerifyReport) -> VerifyReport:
        """The same report with the comparison of one adapter more.

        Args:
            name: The adapter's name.
            report: What was measured with it.
        """
        adapters = {**self.adapters, name: report}
        return dataclasses.replace(self, passed=self.passed and report.passed, adapters=adapters)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, as `gralora_export.json` holds it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A table: each output with its differences; for a cache the largest over all layers."""
        lines = [f"{'output':<28}{'max abs':>12}{'max rel':>12}{'argmax equal':>14}"]
        for check in _layers_as_one(self.tensors):
            agreement = "" if check.argmax_agreement is None else f"{100 * check.argmax_agreement:.1f} %"
            lines.append(f"{check.name:<28}{check.max_abs_error:>12.2e}{check.max_rel_error:>12.2e}{agreement:>14}")
        lines += [] if self.tokens is None else [str(self.tokens)]
        lines += [] if self.rows is None else [f"{ROWS_NAME}: {self.rows}"]
        lines += [f"above the tolerance: {check}" for check in self.rounding]
        verdict = "passed" if self.passed else "FAILED"
        least = "" if self.least_scale == 1 else f" of the largest value, and {self.tolerance * self.least_scale:g}"
        cases = "; ".join(self.cases)
        lines.append(f"{verdict}: {len(self.cases)} cases ({cases}), tolerance {self.tolerance:g}{least}")
        if {self.weights, self.arithmetic} != {"fp32"}:
            lines.append(f"weights in {self.weights}, run in {self.arithmetic} arithmetic")
        if self.weights == "fp16" and not math.isfinite(self.max_abs_error):
            lines.append("the model computes numbers above 65504, where float16 ends; take precision='fp32'")
        lines += [] if self.provider is None else [f"run on {self.provider}"]
        lines.append(f"{self.level} verification, compared with {self.reference}")
        for name, report in self.adapters.items():
            lines += [f"with the adapter {name!r}:", str(report)]
        return "\n".join(lines)


def _layers_as_one(checks: Sequence[TensorCheck]) -> list[TensorCheck]:
    """Merge the checks of a cache's tensors over its layers, into one for keys and one for values."""
    merged: dict[str, TensorCheck] = {}
    for check in checks:
        name = re.sub(r"^present\.\d+\.", "present.*.", check.name)
        other = merged.get(name)
        absolute, relative = (
            max(getattr(c, kind) for c in (check, other or check)) for kind in ("max_abs_error", "max_rel_error")
        )
        merged[name] = TensorCheck(name, absolute, relative, check.argmax_agreement)
    return list(merged.values())


@dataclass(frozen=True)
class AttentionReport:
    """How attention was exported, by one pass or by all of a model's.

    Attributes:
        fused: Number of layers that use ONNX Runtime's fused operator.
        plain: Layers that use plain operators, each with the reason.
    """

    fused: int
    plain: Mapping[str, str]

    @classmethod
    def of(cls, fused: int, skipped: Sequence[Skip]) -> Self:
        """What a pass reports that fused some layers and skipped others."""
        return cls(fused, dict(skipped))

    def __str__(self) -> str:
        """The number of fused layers, and each of the others."""
        lines = [f"attention: {self.fused} layers fused, {len(self.plain)} not"]
        return "\n".join([*lines, *(f"  {layer}: {why}" for layer, why in self.plain.items())])


class CachedAttentionReport(AttentionReport):
    """How attention over a cache was exported: the report of a decoder, whatever else attends in it."""


def attention_report(log: PassLog) -> AttentionReport | None:
    """Which layers' attention is fused, in all parts of the model, where there is any.

    Args:
        log: What the passes of an export did.
    """
    over_cache, reports = log.summaries(CachedAttentionReport), log.summaries(AttentionReport)
    if over_cache or not reports:
        return next(iter(over_cache), None)
    plain = {layer: why for report in reports for layer, why in report.plain.items()}
    return AttentionReport(sum(report.fused for report in reports), plain)


@dataclass(frozen=True)
class ExpertsReport:
    """How a mixture's experts were exported.

    Attributes:
        fused: How many layers have one operator for their experts.
        plain: The other layers, whose experts are computed in a loop or in products of their own, each with the reason.
    """

    fused: int
    plain: Mapping[str, str]

    def __str__(self) -> str:
        """The number of fused layers, and each of the others."""
        lines = [f"experts: {self.fused} layers with one operator each, {len(self.plain)} without"]
        return "\n".join([*lines, *(f"  {layer}: {why}" for layer, why in self.plain.items())])


def experts_report(log: PassLog) -> ExpertsReport | None:
    """How the experts of all parts of a model were exported; None for a model without any.

    Args:
        log: What the passes of an export did.
    """
    reports = log.summaries(ExpertsReport)
    plain = {layer: why for report in reports for layer, why in report.plain.items()}
    return ExpertsReport(sum(report.fused for report in reports), plain) if reports else None


@dataclass(frozen=True)
class ExportReport:
    """The result of `export_onnx`.

    Attributes:
        output_dir: The directory written.
        files: Its files with their sizes in bytes.
        seconds: Seconds that each stage took.
        verification: The result of verification, or None if it was skipped.
        attention: Which layers' attention is fused; None for a model without any.
        experts: Which layers' experts are one operator; None for a model without any.
        passes: What every pass did, in order.
        quality: What quantization changes, where that was measured.
        adapter_inputs: The adapter tensors that the export takes; None where adapters are folded.
        rows: The graph for rows that differ in length or adapter, or why there is none; None where none is asked for.
        quantization: How matrices are quantized, and which have a format of their own; None for floats.
    """

    output_dir: Path
    files: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    verification: VerifyReport | None = None
    attention: AttentionReport | None = None
    experts: ExpertsReport | None = None
    passes: tuple[PassReport, ...] = ()
    quality: Quality | None = None
    adapter_inputs: AdapterInputs | None = None
    rows: RowsEntry | None = None
    quantization: QuantizedWeights | None = None

    def __str__(self) -> str:
        """The files, the time of each stage, the adapters it takes, the verification, and what quantization changes."""
        lines = written_lines(self.output_dir, self.files)
        lines.append("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()))
        if self.adapter_inputs is not None:
            lines.append(_taken(self.adapter_inputs))
        if self.rows is not None:
            lines.append(str(self.rows))
        if self.attention is not None:
            lines.append(str(self.attention))
        if self.experts is not None:
            lines.append(str(self.experts))
        if self.quantization is not None:
            lines.append(str(self.quantization))
        if self.verification is not None:
            lines.append(str(self.verification))
        if self.quality is not None:
            lines.append(str(self.quality))
        return "\n".join(lines)


def _taken(inputs: AdapterInputs) -> str:
    """Which adapters an export takes, now and later: what the export fixes."""
    form = "LoRA, or GraLoRA of any gralora_k as the LoRA that it equals"
    if inputs.k:
        form = f"GraLoRA of gralora_k={inputs.k}, which this export fixes, or LoRA"
    return f"takes adapters at {len(inputs.sites)} layers ({inputs.mode}): {form}"
