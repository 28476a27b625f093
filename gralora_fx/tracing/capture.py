"""Capture of a live model as a graph, by transformers' exporter or PyTorch's, with patches while it is traced.

The attention of a decoder with a cache becomes one node for each layer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from gralora_fx.compat.transformers_exporters import auto_dynamic_shapes, export_program
from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.progress.stages import quiet
from gralora_fx.tracing.draft import NO_CHECKPOINTS, Axes, Captured, Draft
from gralora_fx.tracing.failures import reason, where
from gralora_fx.tracing.inputs.cache import PAST, CacheLayout, cache_layout, own_inputs
from gralora_fx.tracing.inputs.image_sizes import IMAGES
from gralora_fx.tracing.patches.decoder_operators import decoder_operators
from gralora_fx.tracing.patches.recognised import replaced
from gralora_fx.tracing.patches.traceable import IN_EVERY_MODEL, experts_as_products, traceable_modes


def capture(draft: Draft) -> Captured:
    """The draft with the graph of its model in the model's current mode, as it was exported.

    Raises:
        TraceError: The model cannot be traced; the message says where and why.
    """
    model, sample = draft.model, draft.sample
    try:
        with quiet(), replaced(model, IN_EVERY_MODEL), experts_as_products(model), traceable_modes() as checkpoints:
            if isinstance(model, PreTrainedModel):
                program = export_transformers_model(model, sample, draft.axes)
            else:
                shapes = dynamic_axes(sample, draft.axes)
                # with gradients, so that regions without gradients are recorded
                with torch.enable_grad():
                    program = torch.export.export(model, (), dict(sample), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of every type
        raise TraceError(f"cannot trace {type(model).__name__}{where(model, error)}: {reason(error)}") from error
    if checkpoints:
        warn_caller(f"{NO_CHECKPOINTS} (checkpoints of {', '.join(dict.fromkeys(checkpoints))})")
    return Captured(**vars(draft), graph_module=program.module(check_guards=False))


def export_transformers_model(
    model: PreTrainedModel, inputs: Mapping[str, Any], axes: Axes
) -> torch.export.ExportedProgram:
    """Export a transformers model in its current mode, with a cache if one is given.

    Args:
        model: The model; its modules and parameters stay unchanged.
        inputs: Keyword inputs of its forward; with past keys and values it is a step with a cache.
        axes: Which axes may vary.

    Returns:
        A program over the model's own parameters.
    """
    shapes, own, forward = dynamic_axes(inputs, axes), own_inputs(inputs), model.forward
    if "use_cache" in inspect.signature(forward).parameters:
        forward = functools.partial(forward, use_cache=PAST in inputs)
    is_decoder = cache_layout(inputs) is CacheLayout.DECODER
    with (
        patch.object(model, "forward", forward),
        decoder_operators(model, inputs) if is_decoder else nullcontext(),
    ):
        return export_program(model, own, shapes, dynamic=axes is not Axes.NONE)


def dynamic_axes(inputs: Mapping[str, Any], axes: Axes = Axes.SEQUENCES) -> dict[str, Any] | None:
    """`dynamic_shapes` for `torch.export`: all axes may vary; of a cache batch and length, of images mostly the batch.

    Many vision models are made for one image size; with dynamic height and width some cannot be traced.

    Args:
        inputs: Inputs by name.
        axes: Which axes may vary.
    """
    if axes is Axes.NONE:
        return None
    shapes = auto_dynamic_shapes(inputs)
    if IMAGES in shapes and axes is not Axes.IMAGES:
        shapes[IMAGES] = {0: torch.export.Dim.AUTO}
    if PAST in shapes:
        shapes[PAST] = [{0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO} for _ in shapes[PAST]]
    return shapes
