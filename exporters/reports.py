"""What an export and its verification found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorCheck:
    """How one output of ONNX Runtime compares with PyTorch's, over all cases.

    Attributes:
        name: Name of the output.
        max_abs_error: Largest difference of a value.
        max_rel_error: The same over the largest value that PyTorch gave in that case.
        argmax_agreement: Share of rows whose largest value stands at the same place, or None for other outputs.
    """

    name: str
    max_abs_error: float
    max_rel_error: float
    argmax_agreement: float | None


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify_onnx`.

    Attributes:
        passed: Whether every output is within the tolerance in every case.
        tolerance: Largest difference allowed, relative to the largest value or to 1 where that is smaller.
        cases: The inputs that were compared.
        tensors: One entry for each output.
        weights: Precision of the export's weights, such as `fp16` or `int4`.
        arithmetic: Precision that it was run in.
    """

    passed: bool
    tolerance: float
    cases: tuple[str, ...]
    tensors: tuple[TensorCheck, ...]
    weights: str = "fp32"
    arithmetic: str = "fp32"

    @property
    def max_abs_error(self) -> float:
        """Largest difference of any value."""
        return max((tensor.max_abs_error for tensor in self.tensors), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, as `gralora_export.json` holds it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A table: each output with its differences."""
        lines = [f"{'output':<28}{'max abs':>12}{'max rel':>12}{'argmax equal':>14}"]
        for check in self.tensors:
            agreement = "" if check.argmax_agreement is None else f"{100 * check.argmax_agreement:.1f} %"
            lines.append(f"{check.name:<28}{check.max_abs_error:>12.2e}{check.max_rel_error:>12.2e}{agreement:>14}")
        verdict = "passed" if self.passed else "FAILED"
        lines.append(f"{verdict}: {len(self.cases)} cases ({'; '.join(self.cases)}), tolerance {self.tolerance:g}")
        if {self.weights, self.arithmetic} != {"fp32"}:
            lines.append(f"weights in {self.weights}, run in {self.arithmetic} arithmetic")
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportReport:
    """The result of `export_onnx`.

    Attributes:
        output_dir: The directory written.
        files: Its files with their sizes in bytes.
        seconds: Seconds that each stage took.
        verification: What verification found, or None where it was left out.
    """

    output_dir: Path
    files: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    verification: VerifyReport | None = None

    def __str__(self) -> str:
        """The files, the time of each stage and the verification."""
        lines = [f"wrote {self.output_dir}"]
        lines += [f"  {name:<28}{size:>14,} bytes" for name, size in self.files.items()]
        lines.append("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()))
        if self.verification is not None:
            lines.append(str(self.verification))
        return "\n".join(lines)
