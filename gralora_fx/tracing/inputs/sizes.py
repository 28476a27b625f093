"""Samples of other sizes: enlarged so that no axis is fixed by accident, resized, and those to check a trace with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from gralora_fx.compat.torch_graphs import tree_leaves, tree_map, tree_map_only
from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.tracing.inputs.cache import PAST, cached_inputs, decoder_step
from gralora_fx.tracing.inputs.image_sizes import DYNAMIC, IMAGES, ImageSize, check_image_size

INTERPOLATE = "interpolate_pos_encoding"  # transformers' argument of models with a table of positions
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
_MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}


def widen(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Enlarge inputs to at least two rows, three positions and one padded row, so that no axis is fixed.

    `torch.export` treats an axis of size 1 as constant, and drops a mask that masks nothing.

    Args:
        model: The model to run.
        inputs: A user's inputs, a single text included.
    """
    sample = {name: value for name, value in inputs.items() if value is not None}
    if PAST in sample and isinstance(model, PreTrainedModel):
        if model.config.is_encoder_decoder:
            return _widen_step(model, sample)
        return cached_inputs(model)  # the values do not matter, and the sizes would have to be changed consistently
    if isinstance(model, PreTrainedModel):
        accepted = inspect.signature(model.forward).parameters
        for mask, ids in _MASKS.items():
            if mask == "attention_mask" and ids in sample and mask in accepted and mask not in sample:
                sample[mask] = torch.ones_like(sample[ids])
        for group in (_TEXT_INPUTS, _DECODER_INPUTS):
            sample = _with_positions(sample, group)
    tensors = [leaf for leaf in tree_leaves(sample) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if tensors and all(leaf.shape[0] == 1 for leaf in tensors):
        sample = tree_map(_with_two_rows, sample)
    for name, value in sample.items():
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == 1:
            warn_caller(
                f"axis 1 of the example input {name!r} has size 1 and stays fixed; a longer example lets it vary"
            )
    return padded(sample)


def _widen_step(model: PreTrainedModel, sample: Mapping[str, Any]) -> dict[str, Any]:
    source = {name: value for name, value in sample.items() if name not in (*_DECODER_INPUTS, PAST)}
    return decoder_step(model, widen(model, source))


def _with_positions(sample: dict[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
    present = [name for name in group if isinstance(sample.get(name), torch.Tensor) and sample[name].ndim >= 2]
    if not present or any(sample[name].shape[1] >= 3 for name in present):
        return sample
    return {name: torch.cat([value] * 4, dim=1) if name in present else value for name, value in sample.items()}


def _with_two_rows(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def padded(sample: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a padded row in each mask that masks nothing; changed in place."""
    for mask in _MASKS:
        value = sample.get(mask)
        if isinstance(value, torch.Tensor) and value.ndim == 2 and bool(value.all()) and value.shape[1] > 1:
            value = value.clone()
            value[-1, -1] = 0
            sample[mask] = value
    return sample


def distinct(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without repeated tensors, since `torch.export` makes a tensor passed twice a single input.

    Args:
        inputs: Inputs by name.
    """
    seen: set[int] = set()

    def unshared(tensor: Tensor) -> Tensor:
        is_first = id(tensor) not in seen
        seen.add(id(tensor))
        return tensor if is_first else tensor.detach().clone().requires_grad_(tensor.requires_grad)

    result: dict[str, Any] = tree_map_only(Tensor, unshared, dict(inputs), is_leaf=lambda part: isinstance(part, Cache))
    return result


def at_image_size(
    model: nn.Module, inputs: dict[str, Any], constants: dict[str, Any], image_size: ImageSize
) -> tuple[dict[str, Any], dict[str, Any]]:
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
    if image_size is None:
        return inputs, constants
    check_image_size(image_size)
    if not takes_images(inputs):
        raise TraceError(
            f"image_size=... is for models that take images, {IMAGES} of [batch, channels, height, width], and "
            f"{type(model).__name__} takes {', '.join(inputs)}; leave it out"
        )
    if isinstance(image_size, (tuple, list)):
        inputs = resized(inputs, (image_size[0], image_size[1]))
    if may_interpolate(model) and (image_size == DYNAMIC or tuple(image_size) != _own_size(model)):
        constants = {INTERPOLATE: True, **constants}
    return inputs, constants


def takes_images(inputs: Mapping[str, Any]) -> bool:
    """Whether images `[batch, channels, height, width]` are among the inputs."""
    value = inputs.get(IMAGES)
    return isinstance(value, Tensor) and value.ndim == 4


def may_interpolate(model: nn.Module) -> bool:
    """Whether a model has a table of positions that it may interpolate."""
    return INTERPOLATE in inspect.signature(type(model).forward).parameters


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """The image size in a model's configuration."""
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def resized(sample: Mapping[str, Any], size: tuple[int, int], rows: int | None = None) -> dict[str, Any]:
    """The inputs with images cropped from repetitions of the example's own, and optionally only some rows."""
    images = sample[IMAGES]
    counts = [-(-new // old) for new, old in zip(size, images.shape[2:], strict=True)]
    images = images.repeat(1, 1, *counts)[:, :, : size[0], : size[1]].contiguous()
    inputs = {**sample, IMAGES: images}
    return inputs if rows is None else {name: value[:rows] for name, value in inputs.items()}


def other_sizes(model: nn.Module, sample: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Inputs of other sizes, each with its description, to check a trace with.

    They have one row, one more row, and longer sequences; with a cache, one position after a long past, and an empty
    cache.

    Args:
        model: The model that was traced.
        sample: The inputs that it was traced with.
    """
    if PAST in sample and isinstance(model, PreTrainedModel):
        encodes = model.config.is_encoder_decoder
        yield from _other_step_sizes(model, sample) if encodes else _other_cached_sizes(model)
        return
    tensors = [leaf for leaf in tree_leaves(dict(sample)) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if tensors and len({leaf.shape[0] for leaf in tensors}) == 1:
        yield "one row", tree_map(lambda value: _rows(value, slice(0, 1)), dict(sample))
        yield "another row", tree_map(_with_another_row, dict(sample))
    text = [name for name in _TEXT_INPUTS if _is_sequence(sample.get(name))]
    if text:
        longer = {name: torch.cat([v, v[:, :3]], dim=1) if name in text else v for name, v in sample.items()}
        yield "a longer sequence", longer
    elif all(leaf.ndim == 3 for leaf in tensors) and len({leaf.shape[1] for leaf in tensors}) == 1:
        yield "a longer sequence", tree_map(_with_another_position, dict(sample))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 2


def _rows(value: Any, rows: slice) -> Any:
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def _with_another_row(value: Any) -> Any:
    return torch.cat([value, value[:1]]) if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def _with_another_position(value: Any) -> Any:
    return torch.cat([value, value[:, :1]], dim=1) if isinstance(value, torch.Tensor) else value


def _other_cached_sizes(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Steps of other sizes: one row and one position after a long past, and a prompt after an empty one."""
    yield "one row and one position", cached_inputs(model, batch=1, past=9, length=1)
    yield "an empty cache", cached_inputs(model, batch=3, past=0, length=5)


def _other_step_sizes(model: PreTrainedModel, sample: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls of other sizes: one row and one position after a long past, and a longer source with an empty cache.

    Args:
        model: An encoder-decoder.
        sample: The inputs it was traced with.
    """
    source = {name: value for name, value in sample.items() if name not in ("decoder_input_ids", PAST)}
    first = {name: value[:1] for name, value in source.items()}
    yield "one row and one position", decoder_step(model, first, past=9, length=1)
    longer = {
        name: torch.cat([value, value[:, :2]], dim=1) if value.ndim == 2 else value for name, value in source.items()
    }
    more = {name: torch.cat([value, value[:1]]) for name, value in longer.items()}
    yield "an empty cache", decoder_step(model, more, past=0, length=5)
