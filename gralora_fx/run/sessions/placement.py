"""Which execution provider runs which nodes of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnxruntime

from gralora_fx.errors import warn_caller
from gralora_fx.run.sessions.openvino import arithmetic, is_openvino
from gralora_fx.run.sessions.session import CPU, Runtime
from gralora_fx.run.sessions.session_views import EncoderDecoderSession

_RECORD = "session.record_ep_graph_assignment_info"
_SHOWN = 6  # operators of a provider in a text

Placement = Mapping[str, Mapping[str, int]]


def record_placement(options: onnxruntime.SessionOptions) -> None:
    """Let sessions with these options record which provider each node was given to."""
    options.add_session_config_entry(_RECORD, "1")


def placement_of(session: Any) -> Placement | None:
    """How many nodes of each operator every provider of a session runs.

    Nodes are those of the file, as providers took them before ONNX Runtime fused any.
    """
    if isinstance(session, EncoderDecoderSession):
        parts = [placement_of(part) for part in (session.encoder, session.decoder)]
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
    """The nodes of each provider, as in `OpenVINOExecutionProvider 225, CPUExecutionProvider 2 (Shape 2)`."""
    texts = []
    for position, (name, operators) in enumerate(placement.items()):
        most = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{operator} {count}" for operator, count in most[:_SHOWN]] + ["..."] * (len(most) > _SHOWN)
        texts.append(f"{name} {sum(operators.values())}" + (f" ({', '.join(named)})" if position and named else ""))
    return ", ".join(texts)


def _sum(providers: list[str], parts: list[Placement]) -> Placement:
    return {name: sum((Counter(part.get(name, {})) for part in parts), Counter()) for name in providers}


def warn_of_idle(runtime: Runtime, placement: Placement | None) -> None:
    """Warn of a provider that was asked for and runs no node of the model."""
    if placement is None:
        return
    for name, _ in runtime.providers:
        if name != CPU and not placement.get(name):
            others = ", ".join(other for other, operators in placement.items() if operators)
            warn_caller(f"{name} takes no node of this model, which runs on {others}; leave it out")


def describe_providers(runtime: Runtime, session: Any, *, is_quantized: bool = False) -> list[str]:
    """Every provider of a session with version and device, as far as they are known, and OpenVINO's precision."""
    options = dict(runtime.providers)
    texts = {device.provider: str(device) for device in runtime.devices}
    for device in runtime.devices:
        if is_openvino(device.provider):
            precision = arithmetic(options[device.provider], device, is_quantized=is_quantized)
            texts[device.provider] += f", in {precision} arithmetic"
    return [texts.get(name, f"{name} of onnxruntime {onnxruntime.__version__}") for name in session.get_providers()]
