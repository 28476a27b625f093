"""What differences verification allows, by the arithmetic that an export is run in, and measures of difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gralora_fx.errors import ExportError
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.runtime.openvino import arithmetic, is_openvino
from gralora_fx.runtime.session import Runtime

# Largest difference, relative to the largest value or to 1 where that is smaller. Exports in float16 run in it: largest
# seen 0.004 on tiny random models of 13 architectures, 0.009 on SmolLM2-135M. Those in bfloat16 run in float32 with
# their own weights and constants (see `float32_copy`); the constants round differently: largest seen 0.0004.
_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}
# Of a provider's arithmetic that is less exact than float32: 20 times its largest rounding error of a number, which is
# 2^-11 where numbers have 11 bits, and 2^-8 where they have 8. The fp16 above is as much. In int8 it is 2^-8 of the
# largest of a group of 32, which is about twice their root mean square, so twice as much. Largest seen on OpenVINO:
# 0.012 in bf16 on MiniLM, 0.035 on SmolLM2-135M, and 0.085 in int8 and bf16 on the same quantized to int4.
_OF_ARITHMETIC = {"fp32": 0.0, "tf32": 1e-2, "fp16": 1e-2, "bf16": 8e-2, "int8": 16e-2}
_FROM_THE_MOST_EXACT = ("fp32", "tf32", "fp16", "bf16", "int8")
# what providers compute in that do not keep to a float32 model's precision unless an option says so
_LESS = {"QNNExecutionProvider": "fp16", "CoreMLExecutionProvider": "fp16"}
_NVIDIA = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
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


def arithmetic_of(runtime: Runtime, precision: str, *, is_quantized: bool = False) -> str:
    """The least exact precision that a run computes in.

    Args:
        runtime: The providers with their options.
        precision: Precision of the model that is run.
        is_quantized: Whether it has quantized weights.

    Returns:
        `fp32`, `tf32` (float32 numbers multiplied with the bits of float16), `fp16`, `bf16`, or `int8` where
        activations are rounded to that before they are multiplied.
    """
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
    """CUDA and TensorRT multiply float32 matrices as TF32 unless `use_tf32` is 0."""
    if str(options.get("trt_fp16_enable", "0")).lower() in ("1", "true"):
        return "fp16"
    return "fp32" if str(options.get("use_tf32", "1")).lower() in ("0", "false") else "tf32"


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


def check_finite(name: str, where: str, expected: Tensor, actual: Tensor) -> None:
    """Check that an output is finite wherever the model's is.

    Args:
        name: The output.
        where: The inputs, for the message.
        expected: The model's values.
        actual: The export's, of the same shape.

    Raises:
        ExportError: It is not.
    """
    if bool((expected.isfinite() & ~actual.isfinite()).any()):
        raise ExportError(
            f"the quantized export gives values of {name} that are not finite on {where}, and the model's are finite; "
            "export it without quantize"
        )
