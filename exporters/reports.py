"""The report of an export, and those of its passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from gralora_fx.base.progress.report import Invocation, Report, Summary, slowest, times, written, written_lines
from gralora_fx.core.graph.pipeline import PassLog, PassReport, Skip
from gralora_fx.errors import joined, option
from gralora_fx.exporters.verify_report import VerifyReport
from gralora_fx.format.adapter_inputs import AdapterInputs
from gralora_fx.format.export_usage import comparison_of
from gralora_fx.format.manifest import RowsEntry
from gralora_fx.format.quantized_weights import Quality, QuantizedWeights

Summed = TypeVar("Summed", bound="LayersReport")

# names of an export's stages, with the option that skips each
_STAGES = {
    "fold": "merging adapters",
    "companions": "tracing what runs beside the decoder",
    "choose": f"choosing bits: {option(quantize='int8')} chooses none",
    "convert": "conversion",
    "write": "writing",
    "verify": f"verification: {option(verify=False)} leaves it out",
    "verify-full": f"verification: {option(verify='quick')} compares less, {option(verify=False)} nothing",
    "quality": f"measuring what quantization changes: {option(verify=False)} leaves it out",
}


@dataclass(frozen=True)
class LayersReport:
    """The layers of a kind that one pass exported, or all passes together."""

    fused: int  # number of layers that use ONNX Runtime's fused operator
    plain: Mapping[str, str]  # layers that use other operators, each with the reason
    FIELD: ClassVar[str]  # the kind: the field of `ExportReport` and its name in texts
    FUSED: ClassVar[str] = "layers fused"  # text after the number of fused layers
    PLAIN: ClassVar[str] = "not"  # text after the number of other layers

    @classmethod
    def of(cls, fused: int, skipped: Sequence[Skip]) -> Self:
        """Make the report of a pass from the number of fused layers and the skipped ones."""
        return cls(fused, dict(skipped))

    def __str__(self) -> str:
        """List the number of fused layers, and each of the others."""
        lines = [f"{self.FIELD}: {self.fused} {self.FUSED}, {len(self.plain)} {self.PLAIN}"]
        return "\n".join([*lines, *(f"  {layer}: {why}" for layer, why in self.plain.items())])


class AttentionReport(LayersReport):
    """The layers whose attention is fused."""

    FIELD = "attention"


class CachedAttentionReport(AttentionReport):
    """A decoder's layers whose attention over a cache is fused; it takes the place of reports on other attention."""


def attention_report(log: PassLog) -> AttentionReport | None:
    """Return the layers whose attention is fused, in all parts of the model; None without attention."""
    over_cache, reports = log.summaries(CachedAttentionReport), log.summaries(AttentionReport)
    return next(iter(over_cache), None) if over_cache or not reports else _added(reports)


def layers_reports(log: PassLog) -> dict[str, LayersReport]:
    """Return the fused layers in all parts of a model, by kind, for the kinds that it has."""
    reports: dict[str, list[LayersReport]] = {}
    for report in log.summaries(LayersReport):
        reports.setdefault(report.FIELD, []).append(report)
    attention = attention_report(log)
    added = {kind: _added(of_kind) for kind, of_kind in reports.items()}
    return added if attention is None else added | {attention.FIELD: attention}


def _added(reports: Sequence[Summed]) -> Summed:
    plain = {layer: why for report in reports for layer, why in report.plain.items()}
    return type(reports[0])(sum(report.fused for report in reports), plain)


@dataclass(frozen=True)
class ExportReport(Report):
    """The result of `export_onnx`.

    Attributes:
        output_dir: The directory written.
        files: Its files with their sizes in bytes.
        seconds: Seconds that each stage took.
        verification: The result of verification, or None if it was skipped.
        attention: The layers whose attention is fused; None for a model without attention.
        experts: The layers whose experts are one operator; None for a model without experts.
        passes: The report of every pass, in order.
        quality: The effect of quantization, if it was measured.
        adapter_inputs: The adapter tensors that the export takes; None if adapters are folded.
        rows: The graph for rows that differ in length or adapter, or why there is none; None if none was requested.
        quantization: How matrices are quantized, and those with their own format; None for floats.
        usage: How the export is called, in Python and as a command.
        companions: How matrices of what runs beside a decoder are quantized, by file name; none for floats.
    """

    output_dir: Path
    files: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    verification: VerifyReport | None = None
    attention: LayersReport | None = None
    experts: LayersReport | None = None
    passes: tuple[PassReport, ...] = ()
    quality: Quality | None = None
    adapter_inputs: AdapterInputs | None = None
    rows: RowsEntry | None = None
    quantization: QuantizedWeights | None = None
    usage: Invocation | None = None
    companions: Mapping[str, QuantizedWeights] = field(default_factory=dict)

    @property
    def summary(self) -> Summary:
        """Lines on verification, the files written, how the export is used, notes, and the slowest stage."""
        check, size = self.verification, written(self.output_dir, self.files)
        if self.quality is not None and self.quantization is not None:
            size += f"; {self.quantization.kind} {self.quality.outcome}"
        if check is None:
            return Summary("exported", size, self.usage, self._notes, self._slowest, comparison_of(self.output_dir))
        return Summary(check.outcome, size, self.usage, self._notes, self._slowest)

    @property
    def _notes(self) -> list[str]:
        found = [] if self.verification is None else self.verification.notes
        for what, report in (("attention", self.attention), ("experts", self.experts)):
            if report is not None and report.plain:
                found.append(f"{what} of {len(report.plain)} layer{'s' * (len(report.plain) > 1)} not fused")
        if self.rows is not None and self.rows.file is None:
            found.append(str(self.rows))
        layers = () if self.quantization is None else self.quantization.layers.values()
        for reason, count in Counter(layer.reason for layer in layers if layer.reason).items():
            found.append(f"{count} matri{'x' if count == 1 else 'ces'} of the checkpoint rounded anew: {reason}")
        return found

    @property
    def _slowest(self) -> str:
        level = "" if self.verification is None else self.verification.level
        stage = "verify-full" if level == "full" else "verify"
        return slowest(self.seconds, {**_STAGES, "verify": _STAGES[stage]})

    @property
    def details(self) -> str:
        """Lines on the files, the adapters it takes, verification, the effect of quantization, and times by stage."""
        lines = written_lines(self.output_dir, self.files)
        if self.adapter_inputs is not None:
            lines.append(_taken(self.adapter_inputs))
        parts = (self.rows, self.attention, self.experts, self.quantization)
        lines += [str(part) for part in parts if part is not None]
        lines += [f"{name}.onnx in {quantized}" for name, quantized in self.companions.items()]
        if self.verification is not None:
            lines.append(self.verification.details)
        if self.quality is not None:
            lines.append(str(self.quality))
        lines.append(times(self.seconds))
        return joined([*lines, self._slowest] if self._slowest else lines)


def _taken(inputs: AdapterInputs) -> str:
    """Describe the adapters that an export takes, now and later."""
    form = "LoRA, or GraLoRA of any gralora_k as the LoRA that it equals"
    if inputs.k:
        form = f"GraLoRA of gralora_k={inputs.k}, which this export fixes, or LoRA"
    if inputs.scaled:
        form += f"; DoRA at {len(inputs.scaled)} of them"
    return f"takes adapters at {len(inputs.sites)} layers ({inputs.mode}): {form}"
