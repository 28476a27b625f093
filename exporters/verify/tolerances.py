"""Allowed differences, by arithmetic or by float32's own rounding, and the tally of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import first_line
from gralora_fx.exporters.verify_report import RoundingCheck, TensorCheck, TokenCheck
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.sessions.session import CPU, Runtime

if TYPE_CHECKING:  # loaded where a difference is above the tolerance
    from gralora_fx.exporters.verify.float64_model import Float64Model

# Largest difference, relative to the largest value. Exports in float16 run in it: largest
# seen 0.004 on tiny random models of 13 architectures, 0.009 on SmolLM2-135M. Those in bfloat16 run in float32 with
# their own weights and constants (see `open_comparable`); the constants round differently: largest seen 0.0004.
_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}
# Tolerances of providers whose arithmetic is less exact than float32: 20 times the largest relative rounding error of a
# number, 2^-11 for an 11-bit significand, 2^-8 for 8 bits. That equals the fp16 above. In int8 the error is 2^-8 of the
# largest value in a group of 32, about twice their root mean square, so the tolerance is doubled. Largest seen on
# OpenVINO: 0.012 in bf16 on MiniLM, 0.035 on SmolLM2-135M, and 0.085 in int8 and bf16 on the same quantized to int4.
_OF_ARITHMETIC = {"fp32": 0.0, "tf32": 1e-2, "fp16": 1e-2, "bf16": 8e-2, "int8": 16e-2}
_FROM_THE_MOST_EXACT = ("fp32", "tf32", "fp16", "bf16", "int8")
# arithmetic of providers that do not keep a float32 model's precision by default
_LESS = {"QNNExecutionProvider": "fp16", "CoreMLExecutionProvider": "fp16"}
_NVIDIA = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
# the distance from 1 to the next number
_BITS = {"fp32": 2.0**-23, "tf32": 2.0**-10, "fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 2.0**-7}
_ALLOWED = 4  # times the rounding error of float32 itself
_DRAWS = 4  # runs with random rounding noise
# maximum difference attributed to rounding, relative to 1 at least: a model further off in float32 proves nothing
_LARGEST = 0.01


def tolerance_of(precision: str, arithmetic: str = "fp32") -> float:
    """Return the largest difference that arithmetic explains; quantization adds none, since weights are the same."""
    return max(_TOLERANCES[precision], _OF_ARITHMETIC[arithmetic])


def arithmetic_of(runtime: Runtime, precision: str, *, is_quantized: bool = False) -> str:
    """Return the least exact precision that a run computes in."""
    if [name for name, _ in runtime.providers] == [CPU]:
        return precision
    from gralora_fx.run.sessions.placement import arithmetic, is_openvino

    devices = {device.provider: device for device in runtime.devices}
    precisions = [precision]
    for name, options in runtime.providers:
        if is_openvino(name):
            precisions.append(arithmetic(options, devices[name], is_quantized=is_quantized))
        elif name in _NVIDIA:
            precisions.append(_on_nvidia(options))
        else:
            precisions.append(_LESS.get(name, "fp32"))
    return max(precisions, key=_FROM_THE_MOST_EXACT.index)


def _on_nvidia(options: Mapping[str, Any]) -> str:
    """Return the precision of float32 products on CUDA and TensorRT: `tf32` unless it is off, or TensorRT's `fp16`."""
    if str(options.get("trt_fp16_enable", "0")).lower() in ("1", "true"):
        return "fp16"
    return "fp32" if str(options.get("use_tf32", "1")).lower() in ("0", "false") else "tf32"


def describe_weights(manifest: Manifest) -> str:
    """Describe the precision of an export's weights, quantized ones first, such as `fp16` or `int4, else fp32`."""
    kinds = [] if manifest.quantization is None else [manifest.quantization.kind]
    return ", else ".join([*kinds, manifest.precision])


class ToleranceCheck:
    """Decides whether an export's values are close enough to the model's: within the tolerance, or by a second rule.

    In a model that magnifies float32's last bits more than that, they may be up to four times as far from float64 as
    float32 itself: as PyTorch's float32 values, or as a float64 run whose weights and results carry a bit of float32
    rounding noise each (Monte Carlo arithmetic; Parker, 1997). An export rounds a folded weight once more than its
    model, a fused operator less often. Every use of the second rule is recorded. It holds for values far below 1 too,
    which are what is left of larger ones; their noise is that of the export's arithmetic, within the tolerance of 1.
    """

    def __init__(
        self, model: TracedModel | GraloraModel, tolerance: float, *, use_float64: bool, arithmetic: str = "fp32"
    ) -> None:
        """Prepare the runs; none is made before it is needed."""
        self.tolerance, self._arithmetic, self._models = tolerance, arithmetic, cache(self._make_models)
        self.exceeded: list[RoundingCheck] = []
        self._model, self._is_lost = model, not use_float64  # after an inexcusable difference no other is examined

    def _make_models(self, arithmetic: str) -> list[Float64Model]:
        from gralora_fx.exporters.verify.float64_model import Float64Model

        return [Float64Model(self._model, draw, _BITS[arithmetic]) for draw in range(_DRAWS + 1)]

    def accepts(
        self, where: str, expected: Tensor, actual: Tensor, in_float64: Callable[[Float64Model], Tensor]
    ) -> bool:
        """Compare one tensor."""
        gap, scale = largest_gap(expected, actual), largest_value(expected)
        if gap <= self.tolerance * scale or self._is_lost:
            return gap <= self.tolerance * scale
        arithmetic = self._arithmetic if gap <= self.tolerance else "fp32"
        why_not, rounding = "", 0.0
        try:
            reference, *others = (in_float64(model).double() for model in self._models(arithmetic))
            rounding = max(largest_gap(reference, other) for other in (expected.double(), *others))
        except RuntimeError as error:  # operators without a float64 kernel
            why_not = f"no float64 run to compare with: {first_line(error)}"
        self.exceeded.append(RoundingCheck(where, gap / (scale or 1), rounding / (scale or 1), why_not, arithmetic))
        self._is_lost = not (gap <= _ALLOWED * rounding and rounding <= _LARGEST * max(1, scale))
        return not self._is_lost


class _Difference(NamedTuple):
    """Difference of two tensors: maximum, largest value, and rows whose likeliest token agrees."""

    absolute: float
    largest: float
    is_same: Tensor | None  # None for other outputs, and for logits of no row

    @property
    def relative(self) -> float:
        return self.absolute / (self.largest or 1)


class Tally:
    """Tally of comparisons, described in `cases`: the largest differences, and how many tokens are equal."""

    def __init__(self, check: ToleranceCheck, label: str = "") -> None:
        self.cases: list[str] = []
        self.passed = True
        self._check, self._label = check, label
        self._found: dict[str | int, list[_Difference]] = {}
        self._ties, self._first = 0, ""

    def add(
        self,
        name: str | int,
        place: str,
        expected: Tensor,
        actual: Tensor,
        in_float64: Callable[[Float64Model], Tensor],
    ) -> Tensor | None:
        """Add an output or, by its index, the logits of a step; return which rows of logits have the same token."""
        self.passed &= self._check.accepts(f"{self._label}{place}", expected, actual, in_float64)
        is_logits = (isinstance(name, int) or "logits" in name) and expected.numel() > 0
        is_same = expected.argmax(-1) == actual.argmax(-1) if is_logits else None
        difference = _Difference(largest_gap(expected, actual), largest_value(expected), is_same)
        self._found.setdefault(name, []).append(difference)
        return is_same

    def add_step(
        self, index: int, case: str, expected: Tensor, actual: Tensor, in_float64: Callable[[Float64Model], Tensor]
    ) -> None:
        """Add the logits of a step, `[batch, vocabulary]`, distinguishing near ties from other tokens."""
        is_same = self.add(index, f"{case}, token {index}", expected, actual, in_float64)
        assert is_same is not None
        allowed = 2 * self._check.tolerance * largest_value(expected)
        for row in (~is_same).nonzero().flatten().tolist():
            token, other = int(expected[row].argmax()), int(actual[row].argmax())
            is_tie = float(expected[row, token] - expected[row, other]) <= allowed
            self._ties += is_tie
            tie = " (a near tie)" if is_tie else ""
            self._first = self._first or f"{case}: row {row}, token {index} is {other} instead of {token}{tie}"

    @property
    def tensors(self) -> tuple[TensorCheck, ...]:
        """The report of each output."""
        checks = []
        for name, found in self._found.items():
            shares = [float(each.is_same.float().mean()) for each in found if each.is_same is not None]
            absolute, relative = max(each.absolute for each in found), max(each.relative for each in found)
            checks.append(TensorCheck(str(name), absolute, relative, min(shares, default=None)))
        return tuple(checks)

    @property
    def tokens(self) -> TokenCheck:
        """The report of all steps."""
        steps = [found for _, found in sorted(self._found.items())]
        errors = tuple(max(each.relative for each in found) for found in steps)
        same = [each.is_same for found in steps for each in found if each.is_same is not None]
        compared, equal = sum(map(len, same)), sum(int(rows.sum()) for rows in same)
        return TokenCheck(tuple(self.cases), compared, equal, self._ties, self._first or None, errors, self.passed)


def largest_gap(expected: Tensor, actual: Tensor) -> float:
    """Return the largest absolute difference; infinite if only one of two values is finite."""
    both_missing = expected.isnan() & actual.isnan()
    gap = (expected - actual).abs().masked_fill((expected == actual) | both_missing, 0.0)  # inf equals inf
    if not gap.numel():
        return 0.0
    return float(gap.max()) if bool(torch.isfinite(gap).all()) else float("inf")


def largest_value(tensor: Tensor) -> float:
    """Return the largest finite absolute value; 0 if there is none."""
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0
