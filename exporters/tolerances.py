"""How far an export may be from its model, and how far it is."""

from __future__ import annotations

import torch
from torch import Tensor

# relative to the largest value of a tensor, or to 1 where that is smaller
_PRECISIONS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
_QUANTIZED = {"int8": 1e-1, "int4": 5e-1}


def tolerance_of(precision: str, quantize: str | None = None) -> float:
    """The largest difference that an export's precision explains; a larger one is a fault.

    Args:
        precision: Precision of weights and activations.
        quantize: Quantization of the weights, or None.

    Returns:
        A difference relative to a tensor's largest value, or to 1 where that is smaller.
    """
    return max(_PRECISIONS[precision], 0.0 if quantize is None else _QUANTIZED[quantize])


def largest_gap(expected: Tensor, actual: Tensor) -> float:
    """The largest difference of a value; infinite where only one of them is a number."""
    both_missing = expected.isnan() & actual.isnan()
    gap = (expected - actual).abs().masked_fill((expected == actual) | both_missing, 0.0)  # inf equals inf
    if not gap.numel():
        return 0.0
    return float(gap.max()) if bool(torch.isfinite(gap).all()) else float("inf")


def largest_value(tensor: Tensor) -> float:
    """The largest absolute value that is a number; 0 where there is none."""
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0
