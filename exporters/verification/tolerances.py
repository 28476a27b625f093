"""Tolerances of verification, and measures of difference."""

from __future__ import annotations

import torch
from torch import Tensor

from gralora_fx.runtime.manifest import Manifest

# Largest difference, relative to the largest value or to 1 where that is smaller. Exports in float16 run in it: largest
# seen 0.004 on tiny random models of 13 architectures, 0.009 on SmolLM2-135M. Those in bfloat16 run in float32 with
# their own weights and constants (see `float32_copy`); the constants round differently: largest seen 0.0004.
_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}


def tolerance_of(precision: str) -> float:
    """The largest difference from a model with the same weights that an export's arithmetic explains.

    A larger one is an error. Quantization adds nothing: the reference has the same quantized weights.

    Args:
        precision: Precision of the weights that are not quantized.

    Returns:
        A difference relative to a tensor's largest value, or to 1 where that is smaller.
    """
    return _TOLERANCES[precision]


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
