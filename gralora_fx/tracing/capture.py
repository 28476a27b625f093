"""Capture of transformers models as exported programs, with operators for a decoder's attention."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from transformers import PreTrainedModel

from gralora_fx.compat.transformers_exporters import auto_dynamic_shapes, export_program
from gralora_fx.progress.stages import quiet
from gralora_fx.tracing.inputs.decoder_cache import PAST, CacheLayout, cache_layout, copied, equal_sizes, tensors_of
from gralora_fx.tracing.inputs.image_sizes import IMAGES
from gralora_fx.tracing.patches.attention import attention_as_operators
from gralora_fx.tracing.patches.recognised import IN_DECODERS, replaced
from gralora_fx.tracing.patches.shape_only_ops import shape_only_ops


class Axes(enum.Enum):
    """Which axes of a trace may vary."""

    NONE = "none"
    SEQUENCES = "all but height and width of images"
    IMAGES = "all"


def export_transformers_model(
    model: PreTrainedModel, inputs: Mapping[str, Any], axes: Axes
) -> torch.export.ExportedProgram:
    """Export a transformers model in its current mode, with a cache if one is given.

    The attention of a decoder with a cache becomes one node for each layer.

    Args:
        model: The model; its modules and parameters stay unchanged.
        inputs: Keyword inputs of its forward; with past keys and values it is a step with a cache.
        axes: Which axes may vary.

    Returns:
        A program over the model's own parameters.
    """
    shapes = dynamic_axes(inputs, axes)
    noted = inputs if cache_layout(inputs) is CacheLayout.DECODER else None
    operators = nullcontext() if noted is None else _operators(model)
    forward = _step_forward(model, use_cache=PAST in inputs, noted=noted)
    with quiet(), patch.object(model, "forward", forward), operators:
        return export_program(model, copied(inputs), shapes, dynamic=axes is not Axes.NONE)


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


@contextmanager
def _operators(model: PreTrainedModel) -> Iterator[None]:
    """Let a decoder call single operators for attention and for functions recognised by their code.

    The nodes get no stack traces, which take a tenth of the time; each still records its module. torch 2.11 has no such
    switch, and collects them.
    """
    without_stacks = patch.object(fx.config, "do_not_emit_stack_traces", True, create=True)
    with attention_as_operators(model), replaced(model, IN_DECODERS), shape_only_ops(), without_stacks:
        yield


def _step_forward(
    model: PreTrainedModel, *, use_cache: bool, noted: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The model's forward with this `use_cache`, whether its config or only its forward knows the flag.

    With `noted`, example inputs of a step, it tells the tracer first which sizes are one.
    """
    forward = model.forward
    if "use_cache" in inspect.signature(forward).parameters:
        forward = functools.partial(forward, use_cache=use_cache)
    return forward if noted is None else _with_noted_sizes(forward, noted)


def _with_noted_sizes(forward: Callable[..., Any], example: Mapping[str, Any]) -> Callable[..., Any]:
    """A step's forward that first tells the tracer which sizes are equal.

    Otherwise every layer adds a guard for its own cache, and the tracer proves the same facts anew each time.
    """
    equal = equal_sizes(example)

    @functools.wraps(forward)
    def noted(*args: Any, **inputs: Any) -> Any:
        tensors = [tensor for _, tensor in tensors_of(inputs)]
        for (first, first_axis), (second, second_axis) in equal:
            torch._check(tensors[first].shape[first_axis] == tensors[second].shape[second_axis])  # type: ignore[no-untyped-call]
        return forward(*args, **inputs)

    return noted
