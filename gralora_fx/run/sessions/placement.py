"""Placement of a model's nodes on execution providers, and the precision that OpenVINO computes in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnxruntime

from gralora_fx.errors import ServingError, shown, warn_caller
from gralora_fx.run.sessions.plugins import Device
from gralora_fx.run.sessions.session import CPU, Runtime
from gralora_fx.run.sessions.session_views import parts_of

OPENVINO = "OpenVINOExecutionProvider"
_OPTIONS = ("load_config", "reshape_input", "enable_causallm", "hint_enable_gqa", "dump_subgraphs")
_PROPERTIES = {  # options of the provider that is built into onnxruntime-openvino, by OpenVINO's names
    "precision": "INFERENCE_PRECISION_HINT",
    "num_of_threads": "INFERENCE_NUM_THREADS",
    "num_streams": "NUM_STREAMS",
    "cache_dir": "CACHE_DIR",
    "model_priority": "MODEL_PRIORITY",
}
_THREADS = "INFERENCE_NUM_THREADS"
_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


def is_openvino(name: str) -> bool:
    """Return whether a provider is OpenVINO's, including variants that choose a device, such as `...Provider.AUTO`."""
    return name.partition(".")[0] == OPENVINO


def complete_options(
    options: Mapping[str, Any], device: Device, threads: int, *, threads_are_given: bool
) -> dict[str, Any]:
    """Return options in OpenVINO's form, with the number of threads."""
    for name in options:
        if name in _PROPERTIES:
            raise ServingError(
                f"{device.provider} takes no option {name!r}; give OpenVINO's property {_PROPERTIES[name]} in "
                f"load_config: {{'load_config': {{'{device.kind}': {{'{_PROPERTIES[name]}': ...}}}}}}"
            )
        if name not in _OPTIONS:
            raise ServingError(
                f"{device.provider} has no option {name!r:.80}; there are device_type, {', '.join(_OPTIONS)}"
            )
    config = _load_config(options)
    others = [name for name in config if name.partition(".")[0] != device.kind.partition(".")[0]]
    if others and device.provider == OPENVINO:
        raise ServingError(
            f"load_config has properties of {', '.join(others)}, but {device.provider} runs on {device.kind}; "
            "choose the device with device_type, or leave them out"
        )
    if device.kind == "CPU":
        properties = config.setdefault("CPU", {})
        if _THREADS in properties and threads_are_given:
            raise ServingError(f"threads and {_THREADS} in load_config are the same; give one of them")
        properties.setdefault(_THREADS, str(threads))
    return {**options, **({"load_config": json.dumps(config)} if config else {})}


def arithmetic(options: Mapping[str, Any], device: Device, *, is_quantized: bool = False) -> str:
    """Return the precision that OpenVINO computes in: `fp32`, `bf16`, `fp16`, or `int8` for rounded activations.

    OpenVINO may compute in less than the model's precision unless told otherwise: in bfloat16 on processors with it, in
    float16 on other devices. On a processor without float16, a hint of it gives bfloat16. Activations of quantized
    weights are rounded to int8 in groups, unless `DYNAMIC_QUANTIZATION_GROUP_SIZE` is 0.
    """
    config = _load_config(options)
    sections = [section for name, section in config.items() if name.partition(".")[0] == device.kind.partition(".")[0]]
    properties = {name: str(value) for section in sections for name, value in section.items()}
    capabilities = device.properties.get("OPTIMIZATION_CAPABILITIES", "").split()
    if is_quantized and properties.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") != "0":
        return "int8"
    hint = properties.get("INFERENCE_PRECISION_HINT")
    if (hint is None and properties.get("EXECUTION_MODE_HINT") == "ACCURACY") or hint == "undefined":
        return "fp32"
    if hint is None:
        if device.kind != "CPU":
            return "fp16"
        return "bf16" if "BF16" in capabilities else "fp16" if "FP16" in capabilities else "fp32"
    if hint == "f16" and device.kind == "CPU" and "FP16" not in capabilities:
        return "bf16" if "BF16" in capabilities else "fp32"
    return _PRECISIONS.get(hint, "fp32")


def _load_config(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    value = options.get("load_config", {})
    try:
        config = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ServingError(f"load_config is not JSON ({error}): {shown(value)}") from error
    if not isinstance(config, Mapping) or not all(isinstance(section, Mapping) for section in config.values()):
        raise ServingError(
            f"load_config must be properties by device, such as {{'CPU': {{'INFERENCE_PRECISION_HINT': 'f32'}}}}, "
            f"but got {shown(value)}"
        )
    return {str(name): dict(section) for name, section in config.items()}


_RECORD = "session.record_ep_graph_assignment_info"
_SHOWN = 6  # operators shown for a provider

Placement = Mapping[str, Mapping[str, int]]


def record_placement(options: onnxruntime.SessionOptions) -> None:
    """Let sessions with these options record each node's provider."""
    options.add_session_config_entry(_RECORD, "1")


def placement_of(session: Any) -> Placement | None:
    """Return the number of nodes of each operator that every provider of a session runs.

    Nodes are those of the file, as assigned before ONNX Runtime fuses any. None if the session did not record them.
    """
    if len(sessions := parts_of(session)) > 1:
        parts = [placement_of(part) for part in sessions]
        return None if None in parts else _sum(session.get_providers(), [part for part in parts if part is not None])
    try:
        session.get_session_options().get_session_config_entry(_RECORD)
    except RuntimeError:  # it has no such entry
        return None
    counts: dict[str, Counter[str]] = {name: Counter() for name in session.get_providers()}
    for subgraph in session.get_provider_graph_assignment_info():
        counts[subgraph.ep_name].update(node.op_type for node in subgraph.get_nodes())
    return counts


def describe_placement(placement: Placement) -> str:
    """Describe the nodes of each provider: `OpenVINOExecutionProvider 225, CPUExecutionProvider 2 (Shape 2)`."""
    texts = []
    for position, (name, operators) in enumerate(placement.items()):
        most = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{operator} {count}" for operator, count in most[:_SHOWN]] + ["..."] * (len(most) > _SHOWN)
        texts.append(f"{name} {sum(operators.values())}" + (f" ({', '.join(named)})" if position and named else ""))
    return ", ".join(texts)


def _sum(providers: list[str], parts: list[Placement]) -> Placement:
    return {name: sum((Counter(part.get(name, {})) for part in parts), Counter()) for name in providers}


def warn_of_idle(runtime: Runtime, placement: Placement | None) -> None:
    """Warn of a requested provider that runs no node of the model."""
    if placement is None:
        return
    for name, _ in runtime.providers:
        if name != CPU and not placement.get(name):
            others = ", ".join(other for other, operators in placement.items() if operators)
            warn_caller(f"{name} takes no node of this model, which runs on {others}; leave it out")


def describe_providers(runtime: Runtime, session: Any, *, is_quantized: bool = False) -> list[str]:
    """Describe a session's providers with known versions and devices, and OpenVINO's precision."""
    options = dict(runtime.providers)
    texts = {device.provider: str(device) for device in runtime.devices}
    for device in runtime.devices:
        if is_openvino(device.provider):
            precision = arithmetic(options[device.provider], device, is_quantized=is_quantized)
            texts[device.provider] += f", in {precision} arithmetic"
    return [texts.get(name, f"{name} of onnxruntime {onnxruntime.__version__}") for name in session.get_providers()]
