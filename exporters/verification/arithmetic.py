"""The precision that an execution provider computes in, and what it is called in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime

from gralora_fx.exporters.reports import ProviderRun
from gralora_fx.runtime.openvino import arithmetic, is_openvino
from gralora_fx.runtime.placement import placement_of
from gralora_fx.runtime.session import CPU, Runtime

_ORDER = ("fp32", "tf32", "fp16", "bf16", "int8")  # from the most exact
# what providers compute in that do not keep to a float32 model's precision unless an option says so
_LESS = {"QNNExecutionProvider": "fp16", "CoreMLExecutionProvider": "fp16"}
_NVIDIA = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}


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
    found = [precision]
    for name, options in runtime.providers:
        if is_openvino(name):
            found.append(arithmetic(options, devices[name], is_quantized=is_quantized))
        elif name in _NVIDIA:
            found.append(_on_nvidia(options))
        else:
            found.append(_LESS.get(name, "fp32"))
    return max(found, key=_ORDER.index)


def provider_run(runtime: Runtime, session: Any) -> ProviderRun:
    """Where an export was run: the first provider, its device, and which provider took which nodes.

    Args:
        runtime: The providers.
        session: A session that they run.
    """
    name, _ = runtime.providers[0]
    device = next((device for device in runtime.devices if device.provider == name), None)
    placement = placement_of(session)
    nodes = {} if placement is None else {provider: dict(counts) for provider, counts in placement.items()}
    if device is None:
        return ProviderRun(name, onnxruntime.__version__, "CPU" if name == CPU else "", nodes)
    return ProviderRun(name, device.version, f"{device.kind} ({device.name})", nodes)


def _on_nvidia(options: Mapping[str, Any]) -> str:
    """CUDA and TensorRT multiply float32 matrices as TF32 unless `use_tf32` is 0."""
    if str(options.get("trt_fp16_enable", "0")).lower() in ("1", "true"):
        return "fp16"
    return "fp32" if str(options.get("use_tf32", "1")).lower() in ("0", "false") else "tf32"
