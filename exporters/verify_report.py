"""Results of verification: an export's values and tokens beside the model's."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gralora_fx.base.progress.report import Report, Summary
from gralora_fx.errors import Message, joined, listed, option
from gralora_fx.format.export_directory import ROWS_NAME


@dataclass(frozen=True)
class TensorCheck:
    """One output of ONNX Runtime compared with PyTorch's, over all cases."""

    name: str  # name of the output
    max_abs_error: float  # largest difference of a value
    max_rel_error: float  # the same, relative to PyTorch's largest value in that case
    argmax_agreement: float | None  # share of rows whose largest value has the same index, or None for other outputs


@dataclass(frozen=True)
class TokenCheck:
    """The greedy tokens of an export compared with PyTorch's; both continue with PyTorch's token."""

    cases: tuple[str, ...]  # the prompts
    compared: int  # how many tokens were compared
    equal: int  # how many are equal
    near_ties: int  # how many differ although PyTorch's logits of the two tokens are within the tolerance
    first_difference: str | None  # where the first token differs, or None
    # largest difference of the last position's logits at each step, that of the prompt first, relative to the largest
    # logit
    step_errors: tuple[float, ...]
    passed: bool = True  # whether the logits of every step are close enough

    @property
    def agreement(self) -> float:
        """Share of equal tokens."""
        return self.equal / self.compared if self.compared else 1.0

    def __str__(self) -> str:
        """List the tokens, the logits by step, and the first difference."""
        largest = max(self.step_errors, default=0.0)
        lines = [
            f"{self.equal} of {self.compared} equal ({100 * self.agreement:.1f} %), "
            f"{self.near_ties} near ties; {_cases(self.cases)}",
            f"logits by step, largest {largest:.1e}: {' '.join(f'{error:.0e}' for error in self.step_errors)}",
        ]
        return "\n".join([*lines, f"first difference: {self.first_difference}"] if self.first_difference else lines)


@dataclass(frozen=True)
class RoundingCheck:
    """A difference above the tolerance, compared with the rounding error of the arithmetic itself."""

    where: str  # the case and the output or token
    difference: float  # difference of the export from PyTorch, relative to the largest value
    rounding: float  # the rounding error there (see `tolerances`); 0 if it could not be determined
    why_not: str = ""  # why it could not be determined
    arithmetic: str = "fp32"  # the arithmetic that it is of

    def __str__(self) -> str:
        name = "float32" if self.arithmetic == "fp32" else self.arithmetic
        return f"{self.where}: {self.difference:.1e}, {self.why_not or f'{name} itself rounds {self.rounding:.1e}'}"


@dataclass(frozen=True)
class ProviderRun:
    """The execution provider that an export was run on."""

    name: str  # the provider
    version: str  # its version; for one that is part of ONNX Runtime, ONNX Runtime's
    device: str  # the device, as far as it is known
    # how many nodes of each operator every provider ran; empty where the CPU is alone
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Format the provider with version and device, and the nodes that each provider ran."""
        device = f" on {self.device}" if self.device else ""
        nodes = ""
        if self.nodes:
            from gralora_fx.run.sessions.placement import describe_placement

            nodes = f"; nodes: {describe_placement(self.nodes)}"
        return f"{self.name} {self.version}{device}{nodes}"


@dataclass(frozen=True)
class VerifyReport(Report):
    """The result of `verify_onnx`.

    Attributes:
        passed: Whether every output is close enough in every case, and the logits of every greedy step: within the
            tolerance, or no more than four times as far off as float32 itself is from float64.
        tolerance: Largest difference allowed, relative to the largest value.
        cases: The inputs that were compared.
        tensors: One entry for each output.
        tokens: Greedy tokens, for an export that generates.
        weights: Precision of the export's weights, such as `fp16` or `int4`.
        arithmetic: Precision in which it was run.
        rounding: The differences above the tolerance, which were compared with a float64 run.
        level: `"quick"` or `"full"`: how many inputs were compared.
        reference: The model that the export was compared with, in words.
        provider: Where it was run, if a provider was requested; None for the CPU provider.
        adapters: For an export that takes adapters as data, the comparison with each; the other fields are of the base.
        rows: Greedy tokens of a decoder's graph whose rows have their own lengths, all adapters in one batch; None if
            there is no such graph, or it was not compared.
        companions: Greedy tokens of prompts that companions of the decoder read too; None without companions.
        differences: Weights and settings in the export's files that are not the model's, each in words.
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
    adapters: Mapping[str, VerifyReport] = field(default_factory=dict)
    rows: TokenCheck | None = None
    companions: TokenCheck | None = None
    differences: tuple[str, ...] = ()

    @property
    def max_abs_error(self) -> float:
        """Largest difference of any value."""
        others = (report.max_abs_error for report in self.adapters.values())
        return max((*(tensor.max_abs_error for tensor in self.tensors), *others), default=0.0)

    def with_adapter(self, name: str, report: VerifyReport) -> VerifyReport:
        """Return the report with the comparison of one adapter more.

        Args:
            name: The adapter's name.
            report: The comparison with it.
        """
        adapters = {**self.adapters, name: report}
        return dataclasses.replace(self, passed=self.passed and report.passed, adapters=adapters)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, as in `gralora_export.json`."""
        return dataclasses.asdict(self)

    @property
    def states(self) -> Mapping[str, VerifyReport]:
        """The comparisons by state: an empty name for the base, ` with 'name'` for an adapter."""
        return {"": self, **{f" with {name!r}": report for name, report in self.adapters.items()}}

    @property
    def tokens_compared(self) -> tuple[TokenCheck, ...]:
        """The greedy tokens of both graphs and of companions' prompts, of the base and each adapter."""
        states = self.states.values()
        found = (check for report in states for check in (report.tokens, report.rows, report.companions))
        return tuple(check for check in found if check is not None)

    @property
    def outcome(self) -> str:
        """One line: whether it passed, and by how much."""
        if not self.passed:
            return f"FAILED: {self._worst}"
        tensors = [tensor for report in self.states.values() for tensor in report.tensors]
        largest = max((tensor.max_rel_error for tensor in tensors), default=0.0)
        same = "" if self.weights == "fp32" else f" (the same {self.weights.partition(',')[0]} weights)"
        found = f"passed: {len(self.cases)} inputs compared with PyTorch{same}, largest difference {largest:.1e}"
        equal, compared = (sum(getattr(one, kind) for one in self.tokens_compared) for kind in ("equal", "compared"))
        return f"{found}; {equal} of {compared} greedy tokens equal" if compared else found

    @property
    def notes(self) -> list[str]:
        """Notes on a passed comparison that a user must see."""
        explained = sum(len(report.rounding) for report in self.states.values()) if self.passed else 0
        found = []
        if explained:
            plural = "s" * (explained > 1)
            found.append(f"{explained} difference{plural} above {self.tolerance:g}, which rounding explains")
        if self.arithmetic not in ("fp32", self.weights):
            found.append(f"run in {self.arithmetic} arithmetic")
        return [*found, *self._overflow]

    @property
    def _overflow(self) -> list[str]:
        if self.weights != "fp16" or math.isfinite(self.max_abs_error):
            return []
        return [Message(f"the model computes numbers above 65504, where float16 ends; take {option(precision='fp32')}")]

    @property
    def summary(self) -> Summary:
        """Lines on whether it passed, and on the compared inputs."""
        provider = "" if self.provider is None else f", on {self.provider.name}"
        compared = f"{self._compared}{provider}, tolerance {self.tolerance:g}"
        return Summary(self.outcome, compared, notes=self.notes)

    @property
    def _compared(self) -> str:
        names = listed(map(repr, self.adapters), 10)
        adapters = f", then with {names}" if names else ""
        return f"{self.level} verification, compared with {self.reference}{adapters}"

    @property
    def _worst(self) -> str:
        """The first difference in files, or the largest unexplained one of results; and the number of differences."""
        if self.differences:
            return f"{len(self.differences)} of the stored weights and settings differ, first: {self.differences[0]}"
        found = [(one.difference, one, state) for state, report in self.states.items() for one in report.rounding]
        if found:
            _, check, state = max(found, key=lambda each: each[0])
            return f"{len(found)} of the compared values differ, most of all {check}{state}"
        differing = [check.first_difference for check in self.tokens_compared if check.first_difference]
        return differing[0] if differing else "the outputs differ"

    @property
    def details(self) -> str:
        """A table of every output, a cache's over all layers, and of every adapter; tokens and cases below it."""
        lines = [f"{'output':<28}{'max abs':>12}{'max rel':>12}{'argmax equal':>14}"]
        tables = {state: _layers_as_one(report.tensors) for state, report in self.states.items()}
        for check in tables[""].values():
            lines += [_row(table[check.name], state) for state, table in tables.items() if check.name in table]
        states = self.states.items()
        lines += _token_lines("greedy tokens", {state: report.tokens for state, report in states})
        lines += _token_lines(f"{ROWS_NAME}: greedy tokens", {state: report.rows for state, report in states})
        lines += _token_lines("with companions: greedy tokens", {state: report.companions for state, report in states})
        for state, report in self.states.items():
            lines += [f"above the tolerance{state}: {check}" for check in report.rounding]
        lines += [f"in the files: {text}" for text in self.differences]
        lines += _verdict(self)
        if {self.weights, self.arithmetic} != {"fp32"}:
            lines.append(f"weights in {self.weights}, run in {self.arithmetic} arithmetic")
        lines += self._overflow
        lines += [] if self.provider is None else [f"run on {self.provider}"]
        return joined([*lines, self._compared])


def _cases(cases: Sequence[str]) -> str:
    return f"{len(cases)} case{'s' * (len(cases) != 1)} ({'; '.join(cases)})"


def _token_lines(title: str, checks: Mapping[str, TokenCheck | None]) -> Iterator[str]:
    """Yield the line for the base's tokens, and one for each adapter's."""
    for state, check in checks.items():
        if check is None:
            continue
        if not state:
            yield f"{title}: {check}"
            continue
        equal, largest = f"{check.equal} of {check.compared} equal", max(check.step_errors, default=0.0)
        yield f" {state}: {equal}, {check.near_ties} near ties, logits within {largest:.1e}"
        if check.first_difference:
            yield f"  first difference: {check.first_difference}"


def _row(check: TensorCheck, state: str) -> str:
    name = f" {state}" if state else check.name
    agreement = "" if check.argmax_agreement is None else f"{100 * check.argmax_agreement:.1f} %"
    return f"{name:<28}{check.max_abs_error:>12.2e}{check.max_rel_error:>12.2e}{agreement:>14}"


def _verdict(report: VerifyReport) -> list[str]:
    """Return whether all passed, or which did not; the cases, once if they are equal."""
    failed = listed(state.strip() for state, one in report.states.items() if state and not one.passed)
    words = "passed" if report.passed else f"FAILED {failed}".rstrip()
    return [f"{words}: {_cases(report.cases)}, tolerance {report.tolerance:g}"]


def _layers_as_one(checks: Sequence[TensorCheck]) -> dict[str, TensorCheck]:
    """Merge the checks of a cache's tensors over its layers, into one for keys and one for values."""
    merged: dict[str, TensorCheck] = {}
    for check in checks:
        name = re.sub(r"^present\.\d+\.", "present.*.", check.name)
        other = merged.get(name)
        absolute, relative = (
            max(getattr(c, kind) for c in (check, other or check)) for kind in ("max_abs_error", "max_rel_error")
        )
        merged[name] = TensorCheck(name, absolute, relative, check.argmax_agreement)
    return merged
