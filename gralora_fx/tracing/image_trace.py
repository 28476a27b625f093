"""Traces of models that take images: of any height and width where the model allows it, else of one."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.tracing.capture import Axes
from gralora_fx.tracing.check import difference, eager_failure
from gralora_fx.tracing.inputs.decoder_cache import PAST
from gralora_fx.tracing.inputs.image_sizes import DYNAMIC, IMAGES, ImageSize, ImageSizes, check_image_size, pixels
from gralora_fx.tracing.inputs.input_trees import fixed_axes
from gralora_fx.tracing.inputs.shape_limits import least_sizes
from gralora_fx.tracing.patches.meta_parameters import is_without_values

INTERPOLATE = "interpolate_pos_encoding"  # transformers' argument of models with a table of positions
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_STRIDE = 32  # of most models from an image to their last features
Inputs = dict[str, Any]
Capture = Callable[[Mapping[str, Any], Axes], fx.GraphModule]


def at_image_size(model: nn.Module, inputs: Inputs, constants: Inputs, image_size: ImageSize) -> tuple[Inputs, Inputs]:
    """Example inputs and constants for a requested image size.

    A model with a table of positions is told to interpolate it, if the size is not its own.

    Args:
        model: The model to trace.
        inputs: Example inputs by name.
        constants: Arguments that become part of the graph.
        image_size: A height and a width, `"dynamic"`, or None for the example's own.

    Raises:
        TraceError: It is not a size, or the model takes no images.
    """
    check_image_size(image_size)
    if image_size is None:
        return inputs, constants
    if not _takes_images(inputs):
        raise TraceError(
            f"image_size=... is for models that take images, {IMAGES} of [batch, channels, height, width], and "
            f"{type(model).__name__} takes {', '.join(inputs)}; leave it out"
        )
    if isinstance(image_size, (tuple, list)):
        inputs = _resized(inputs, (image_size[0], image_size[1]))
    if _may_interpolate(model) and (image_size == DYNAMIC or tuple(image_size) != _own_size(model)):
        constants = {INTERPOLATE: True, **constants}
    return inputs, constants


def trace_sizes(
    model: nn.Module,
    sample: Inputs,
    constants: Mapping[str, Any],
    image_size: ImageSize,
    *,
    dynamic: bool,
    capture: Capture,
) -> tuple[fx.GraphModule, Inputs, ImageSizes | None]:
    """Trace a model, with height and width of its images dynamic where that equals the eager model.

    Args:
        model: The model to trace.
        sample: Inputs by name, in the requested image size.
        constants: Arguments that are part of the graph.
        image_size: What was requested.
        dynamic: Whether any axis may vary.
        capture: Traces the model on inputs.

    Returns:
        The graph, the inputs that it was traced with, and the image sizes that it takes, if it takes images.

    Raises:
        TraceError: The model cannot be traced, or not as requested.
    """
    axes = Axes.SEQUENCES if dynamic else Axes.NONE
    if not _takes_images(sample):
        return capture(sample, axes), sample, None
    size = _size_of(sample)
    step = _step(model)
    other = _resized(sample, _other_size(size, step))
    reason = _why_fixed(model, sample, constants, image_size, dynamic)
    if reason is None and (failure := eager_failure(model, other)) is not None:
        reason = f"the model itself takes no other size: {failure}"
    if reason is None:
        try:
            with warnings.catch_warnings(record=True) as caught:  # those of a failed attempt mean nothing
                warnings.simplefilter("always")
                graph_module = capture(other, Axes.IMAGES)
            sizes = _sizes_of(model, graph_module, other, size, step)
        except TraceError as error:
            reason = str(error)
        else:
            for warning in caught:
                warn_caller(str(warning.message))
            return graph_module, other, sizes
    if image_size == DYNAMIC:
        raise TraceError(
            f"{type(model).__name__} cannot be traced for images of any size: {reason}; give image_size=(height, width)"
        )
    return capture(sample, axes), sample, ImageSizes(size, reason)


def _takes_images(inputs: Mapping[str, Any]) -> bool:
    value = inputs.get(IMAGES)
    return isinstance(value, Tensor) and value.ndim == 4


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """The image size in a model's configuration."""
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _may_interpolate(model: nn.Module) -> bool:
    return INTERPOLATE in inspect.signature(type(model).forward).parameters


def _why_fixed(
    model: nn.Module, sample: Mapping[str, Any], constants: Mapping[str, Any], image_size: ImageSize, dynamic: bool
) -> str | None:
    """Why height and width cannot vary, as far as that is known without running the model."""
    if not dynamic:
        return "it was traced with dynamic=False"
    if image_size not in (None, DYNAMIC):
        return "it was traced with this image_size"
    if PAST in sample:
        return "it was traced with a cache"
    if _may_interpolate(model) and constants.get(INTERPOLATE) is not True:
        return f"its positions are those of one size, unless it is traced with image_size={DYNAMIC!r}"
    others = [name for name in sample if name not in (IMAGES, *_TEXT)]
    if others:
        return f"its input {others[0]!r} may depend on the size"
    if is_without_values(model):
        return "its weights are not in memory, so other sizes cannot be compared with the model"
    return None


def _step(model: nn.Module) -> int:
    """The multiples in which sizes are tried: of the strides, or of a patch that is none of them."""
    patch = getattr(getattr(model, "config", None), "patch_size", None) if isinstance(model, PreTrainedModel) else None
    patch = max(patch) if isinstance(patch, (list, tuple)) and patch else patch
    return patch if isinstance(patch, int) and patch > 0 and _STRIDE % patch else _STRIDE


def _size_of(sample: Mapping[str, Any]) -> tuple[int, int]:
    height, width = sample[IMAGES].shape[2:]
    return int(height), int(width)


def _other_size(size: tuple[int, int], step: int) -> tuple[int, int]:
    """A size with another height and width, both multiples of the step: a model may branch on equal ones."""
    half = max(1, size[0] // step // 2) * step
    free = [candidate for candidate in range(half, half + 4 * step, step) if candidate not in size]
    return free[0], free[1]


def _resized(sample: Mapping[str, Any], size: tuple[int, int], rows: int | None = None) -> Inputs:
    """The inputs with images cropped from repetitions of the example's own, and optionally only some rows."""
    images = sample[IMAGES]
    counts = [-(-new // old) for new, old in zip(size, images.shape[2:], strict=True)]
    images = images.repeat(1, 1, *counts)[:, :, : size[0], : size[1]].contiguous()
    inputs = {**sample, IMAGES: images}
    return inputs if rows is None else {name: value[:rows] for name, value in inputs.items()}


def _sizes_of(
    model: nn.Module, graph_module: fx.GraphModule, sample: Inputs, own: tuple[int, int], step: int
) -> ImageSizes:
    """The sizes for which a trace equals the eager model.

    Raises:
        TraceError: Height or width is fixed in the trace, or it differs from the model for other multiples of the step.
    """
    fixed = fixed_axes(graph_module.graph, sample)[IMAGES][2:]
    if any(axis is not None for axis in fixed):
        raise TraceError("its forward branches on height or width")
    height, width = _size_of(sample)

    def gap(size: tuple[int, int]) -> str | None:
        try:
            problem = difference(model, graph_module, _resized(sample, size, rows=1))
        except TraceError as error:  # the model itself does not support this size
            return str(error)
        return None if problem is None else f"with images of {pixels(size)} {problem}"

    odd = ((height + 1, width + 3), (height + step // 2 + 1, width + step // 2))
    multiple_of = step if any(gap(size) for size in odd) else 1
    tried = [(width, height), (height + step, width + 2 * step), (height, width + step)]
    tried += [own] if all(axis % multiple_of == 0 for axis in own) else []
    problem = next(filter(None, map(gap, tried)), None)
    if problem is not None:
        raise TraceError(problem)
    sizes = ImageSizes(least=least_sizes(graph_module.graph, IMAGES), multiple_of=multiple_of)
    least = sizes.fitting((1, 1))
    while gap(least) is not None and least != (height, width):  # a size of one may be taken for another
        least = min(2 * least[0], height), min(2 * least[1], width)
    return ImageSizes(least=sizes.fitting(least), multiple_of=multiple_of)
