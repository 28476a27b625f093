"""Tolerances of verification, and measures of difference."""

from __future__ import annotations

import torch
from torch import Tensor

from gralora_fx.runtime.manifest import Manifest

# Largest difference, relative to the largest value or to 1 where that is smaller. Exports in float16 run in it: largest
# seen 0.004 on tiny random models of 13 architectures, 0.009 on SmolLM2-135M. Those in bfloat16 run in float32 with
# their own weights and constants (see `float32_copy`); the constants round differently: largest seen 0.0004.
_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}
# Of a provider's arithmetic that is less exact than float32: 20 times its largest rounding error of a number, which is
# 2^-11 where numbers have 11 bits, and 2^-8 where they have 8. The fp16 above is as much. In int8 it is 2^-8 of the
# largest of a group of 32, which is about twice their root mean square, so twice as much. Largest seen on OpenVINO:
# 0.012 in bf16 on MiniLM, 0.035 on SmolLM2-135M, and 0.085 in int8 and bf16 on the same quantized to int4.
_OF_ARITHMETIC = {"fp32": 0.0, "tf32": 1e-2, "fp16": 1e-2, "bf16": 8e-2, "int8": 16e-2}
LEAST_SCALE = 1 / 20  # such a difference may also be one rounding error of 1, however small the largest value is


def tolerance_of(precision: str, arithmetic: str = "fp32") -> float:
    """The largest difference from a model with the same weights that an export's arithmetic explains.

    A larger one is an error. Quantization adds nothing: the reference has the same quantized weights.

    Args:
        precision: Precision of the weights that are not quantized.
        arithmetic: Precision that an execution provider computes in.

    Returns:
        A difference relative to a tensor's largest value, or to 1 where that is smaller.
    """
    return max(_TOLERANCES[precision], _OF_ARITHMETIC[arithmetic])


def describe_weights(manifest: Manifest) -> str:
    """Precision of an export's weights, quantized ones first, such as `fp16` or `int4, else fp32`.

    Args:
        manifest: The export's manifest.
    """
    kinds = [] if manifest.quantization is None else [manifest.quantization.kind]
    return ", else ".join([*kinds, manifest.precision])


def largest_gap(expected: Tensor, actual: Tensor) -> float:
    """The largest absolute difference; infinite if only one of two values is finite."""
    both_missing = expected.isnan() & actual.isnan()
    gap = (expected - actual).abs().masked_fill((expected == actual) | both_missing, 0.0)  # inf equals inf
    if not gap.numel():
        return 0.0
    return float(gap.max()) if bool(torch.isfinite(gap).all()) else float("inf")


def largest_value(tensor: Tensor) -> float:
    """The largest finite absolute value; 0 if there is none."""
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0
