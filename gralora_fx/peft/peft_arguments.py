"""Conversions and checks of the arguments of PEFT's functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.samples import infer_task
from gralora_fx.core.tracing.trace import trace
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ConfigError, RewriteError, TraceError, marked
from gralora_fx.format.tasks import with_past


def traced_with_cache(model: Any, tracing: Mapping[str, Any]) -> TracedModel:
    """Trace a model, with its cache if it generates."""
    if isinstance(model, TracedModel):
        return model
    if isinstance(model, GraloraModel):
        raise RewriteError(
            f"the {type(model).__name__} has adapters already; add another one with add_adapter or load_adapter"
        )
    if not isinstance(model, PreTrainedModel) or tracing.keys() & {"task", "example_inputs", "kwargs"}:
        return trace(model, **tracing)
    task = infer_task(model)
    if not model.can_generate() or with_past(task) == task:
        return trace(model, **tracing)
    try:
        return trace(model, task=with_past(task), **tracing)
    except TraceError as error:
        raise error.reworded(
            f"{marked(error)}. To train without generating, give get_peft_model(..., task={task!r})"
        ) from error


def name_of(model: Any) -> str | None:
    """Return the path or hub id that a model was loaded from; None if unknown."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or None


def check_adapter_dtype(model: Any, autocast_adapter_dtype: bool) -> None:
    """Raise unless adapters will have the requested dtype."""
    if autocast_adapter_dtype or not hasattr(model, "parameters"):
        return
    parameters: Iterable[Tensor] = model.parameters()
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in parameters):
        raise ConfigError(
            "autocast_adapter_dtype=False is not supported: adapters of half-precision layers are float32; leave it out"
        )


def check_unsupported(**arguments: Any) -> None:
    """Raise if an argument of PEFT's without meaning here is given."""
    for name, value in arguments.items():
        if value:
            raise ConfigError(f"{name}={value!r} is not supported; leave it out, or use peft itself")
