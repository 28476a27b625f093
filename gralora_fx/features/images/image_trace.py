"""Traces of models that take images: of any height and width where the model allows it, else of one."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.core.tracing.capture import trace_both_modes
from gralora_fx.core.tracing.check import difference, eager_failure, fixed_axes
from gralora_fx.core.tracing.draft import Captured, Draft
from gralora_fx.errors import Message, TraceError, marked, option, remedy, warn_caller
from gralora_fx.features.images.image_sizes import DYNAMIC, ImageSize, ImageSizes, check_image_size, pixels
from gralora_fx.features.images.tasks_and_inputs import IMAGES
from gralora_fx.format.input_names import PAST

_INTERPOLATE = "interpolate_pos_encoding"  # transformers' argument of models with a table of positions
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_STRIDE = 32  # of most models from an image to their last features
_LARGE = 8192  # a height and a width for which no size in a model is empty


def trace_images(draft: Draft) -> Captured:
    """Trace a model that takes images, with dynamic height and width where the graph then equals the eager model."""
    held = dataclasses.replace(draft, held=(IMAGES,))
    if not _takes_images(draft.sample):  # patches, or one image of any size
        return trace_both_modes(draft if getattr(draft.sample.get(IMAGES), "ndim", 0) == 3 else held)
    model, size = draft.model, _size_of(draft.sample)
    step = _step(model)
    other = dataclasses.replace(draft, sample=_resized(draft.sample, _other_size(size, step)))
    reason = _why_fixed(draft)
    if reason is None and (failure := eager_failure(model, other.sample)) is not None:
        reason = f"the model itself takes no other size: {failure}"
    if reason is None:
        try:
            with warnings.catch_warnings(record=True) as caught:  # those of a failed attempt mean nothing
                warnings.simplefilter("always")
                traced = trace_both_modes(other)
            sizes = _sizes_of(traced, size, step)
        except TraceError as error:
            reason = Message(error)
        else:
            for warning in caught:
                warn_caller(marked(warning.message))
            return _with_sizes(traced, sizes)
    if _asked(draft) == DYNAMIC:
        raise TraceError(
            f"{type(model).__name__} cannot be traced for images of any size: {marked(reason)}; give "
            f"{remedy('image_size=(height, width)', '--image-size [HxW|dynamic]')}"
        )
    return _with_sizes(trace_both_modes(held), ImageSizes(size, reason))


def _with_sizes(traced: Captured, sizes: ImageSizes) -> Captured:
    return dataclasses.replace(traced, facts={**traced.facts, "image_sizes": sizes})


def _asked(draft: Draft) -> ImageSize:
    """Return the size of images that was asked for; None if none was."""
    size: ImageSize = draft.options.get("image_size")
    return size


def _why_fixed(draft: Draft) -> str | None:
    """Return why height and width cannot vary, as far as that is known without running the model."""
    if not draft.dynamic:
        return "it was traced with dynamic=False"
    if _asked(draft) not in (None, DYNAMIC):
        return "it was traced with this image_size"
    if PAST in draft.sample:
        return "it was traced with a cache"
    if _may_interpolate(draft.model) and draft.constants.get(_INTERPOLATE) is not True:
        return Message(f"its positions are those of one size, unless it is traced with {option(image_size=DYNAMIC)}")
    others = [name for name in draft.sample if name not in (IMAGES, *_TEXT)]
    if others:
        return f"its input {others[0]!r} may depend on the size"
    if not draft.has_values:
        return "its weights are not in memory, so other sizes cannot be compared with the model"
    return None


def _step(model: nn.Module) -> int:
    """Return the multiples in which sizes are tried: of the strides, or of a patch that is none of them."""
    patch = getattr(getattr(model, "config", None), "patch_size", None) if isinstance(model, PreTrainedModel) else None
    patch = max(patch) if isinstance(patch, (list, tuple)) and patch else patch
    return patch if isinstance(patch, int) and patch > 0 and _STRIDE % patch else _STRIDE


def _size_of(sample: Mapping[str, Any]) -> tuple[int, int]:
    height, width = sample[IMAGES].shape[2:]
    return int(height), int(width)


def _other_size(size: tuple[int, int], step: int) -> tuple[int, int]:
    """Return a size whose height and width differ, both multiples of the step: a model may branch on equal ones."""
    half = max(1, size[0] // step // 2) * step
    free = [candidate for candidate in range(half, half + 4 * step, step) if candidate not in size]
    return free[0], free[1]


def _sizes_of(draft: Captured, own: tuple[int, int], step: int) -> ImageSizes:
    """Return the sizes for which a trace equals the eager model."""
    graph = draft.graph_module.graph
    fixed = fixed_axes(graph, draft.sample)[IMAGES][2:]
    if any(axis is not None for axis in fixed):
        raise TraceError("its forward branches on height or width")
    height, width = _size_of(draft.sample)

    def gap(size: tuple[int, int]) -> str | None:
        try:
            problem = difference(draft, _resized(draft.sample, size, rows=1))
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
    sizes = ImageSizes(least=least_sizes(graph, IMAGES), multiple_of=multiple_of)
    least = sizes.fitting((1, 1))
    while gap(least) is not None and least != (height, width):  # a size of one may be taken for another
        least = min(2 * least[0], height), min(2 * least[1], width)
    return ImageSizes(least=sizes.fitting(least), multiple_of=multiple_of)


def least_sizes(graph: fx.Graph, name: str) -> tuple[int, int]:
    """Return the smallest height and width of an image for which no axis of any traced value in a graph is empty."""
    image = next(node for node in graph.find_nodes(op="placeholder") if node.target == name).meta["val"]
    height, width = (_expression(size) for size in image.shape[2:])
    sizes = {expression for node in graph.nodes for expression in _expressions(node.meta.get("val"))}
    hints = {symbol: _LARGE for expression in sizes for symbol in expression.free_symbols}
    return _least(sizes, height, hints), _least(sizes, width, hints)


def _least(sizes: set[Any], axis: Any, hints: dict[Any, int]) -> int:
    """Return the smallest value of an axis, the others being large, for which all sizes are at least one."""
    bound = [size for size in sizes if axis in size.free_symbols]
    low, high = 1, _LARGE
    while low < high:  # sizes grow with the axis
        middle = (low + high) // 2
        if all(int(size.subs({**hints, axis: middle})) >= 1 for size in bound):
            high = middle
        else:
            low = middle + 1
    return low


def _expressions(value: Any) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield from (_expression(size) for size in leaf.shape if isinstance(size, torch.SymInt))


def _expression(size: Any) -> Any:
    """Return a symbolic size as an expression over the symbols of the inputs' axes."""
    return size.node.expr


def _at_image_size(
    model: nn.Module, inputs: dict[str, Any], constants: dict[str, Any], image_size: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return example inputs and constants for a requested image size; a table of positions is interpolated."""
    check_image_size(image_size)
    if not _takes_images(inputs):
        raise TraceError(
            f"{option(image_size=...)} is for models that take images, {IMAGES} of [batch, channels, height, width], "
            f"and {type(model).__name__} takes {', '.join(inputs)}; leave it out"
        )
    if isinstance(image_size, (tuple, list)):
        inputs = _resized(inputs, (image_size[0], image_size[1]))
    if _may_interpolate(model) and (image_size == DYNAMIC or tuple(image_size) != _own_size(model)):
        constants = {_INTERPOLATE: True, **constants}
    return inputs, constants


def _may_interpolate(model: nn.Module) -> bool:
    """Return whether a model has a table of positions that it may interpolate."""
    return _INTERPOLATE in inspect.signature(type(model).forward).parameters


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _resized(sample: Mapping[str, Any], size: tuple[int, int], rows: int | None = None) -> dict[str, Any]:
    """Return the inputs with images cropped from repetitions of the example's own, of some rows if asked."""
    images = sample[IMAGES]
    counts = [-(-new // old) for new, old in zip(size, images.shape[2:], strict=True)]
    images = images.repeat(1, 1, *counts)[:, :, : size[0], : size[1]].contiguous()
    inputs = {**sample, IMAGES: images}
    return inputs if rows is None else {name: value[:rows] for name, value in inputs.items()}


def _takes_images(inputs: Mapping[str, Any]) -> bool:
    """Return whether images `[batch, channels, height, width]` are among the inputs."""
    return getattr(inputs.get(IMAGES), "ndim", 0) == 4


TRACE_OPTIONS = {"image_size": _at_image_size}
