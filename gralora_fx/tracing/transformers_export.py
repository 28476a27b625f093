"""The one file that touches `transformers.exporters`, which its makers call experimental."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes

from gralora_fx.tracing.quiet import quiet


def export_transformers_model(
    model: PreTrainedModel, inputs: Mapping[str, Any], *, dynamic: bool
) -> torch.export.ExportedProgram:
    """Export a transformers model in the mode it stands in, without a cache.

    Args:
        model: The model; its modules and parameters are left as they are.
        inputs: Keyword inputs of its forward.
        dynamic: Whether every axis of every input that may vary does.

    Returns:
        A program over the model's own parameters.
    """
    with quiet(), _without_cache(model):
        return DynamoExporter().export(model, dict(inputs), DynamoConfig(dynamic=dynamic)).program


def dynamic_axes(inputs: Any) -> Any:
    """`dynamic_shapes` for `torch.export` that leave every axis of every tensor in `inputs` free to vary."""
    return get_auto_dynamic_shapes(inputs)


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Call the model with `use_cache=False`, whether its config or only its forward knows the flag."""
    own = model.__dict__.get("forward")  # an override on the instance; the exporter leaves one behind
    if "use_cache" in inspect.signature(model.forward).parameters:
        model.forward = functools.partial(model.forward, use_cache=False)
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own
