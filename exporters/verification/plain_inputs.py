"""Fresh inputs for a model without a cache: other sizes than the trace's, padded on either side, a single row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gralora_fx.compat.pytree import KeyPath, tree_map_with_path
from gralora_fx.exporters.translation.names import AXES
from gralora_fx.exporters.verification.random_values import LENGTHS, like, longest_text, pad, text_like
from gralora_fx.tracing.inputs.image_sizes import IMAGES, pixels
from gralora_fx.tracing.inputs.input_trees import path_of
from gralora_fx.tracing.traced_model import TracedModel


def plain_inputs(model: TracedModel, generator: torch.Generator, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts of several lengths, padded on either side; other and nested inputs in several batch sizes.

    Args:
        model: A traced model.
        generator: Draws the values.
        quick: Whether few are enough; they are few and short either way.

    Yields:
        A description, and inputs by name.
    """
    inputs = model.graph_inputs
    sample = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(sample) < len(inputs) or not any(
        AXES.get(name, ())[1:2] in (("sequence_length",), ("decoder_sequence_length",)) for name in sample
    ):
        for batch in (1, 3):
            yield (
                f"batch {batch}",
                {name: _nested(model, name, value, batch, generator) for name, value in inputs.items()},
            )
        for image_size in _other_image_sizes(model):
            case = {name: _nested(model, name, value, 2, generator) for name, value in inputs.items()}
            case[IMAGES] = _images(case[IMAGES], image_size, generator)
            yield f"2 images of {pixels(image_size)}", case
        return
    limit = longest_text(model)
    rows, positions_held = _held_sizes(model, sample)
    image_sizes = iter(_other_image_sizes(model))
    for batch, length, padding in ((1, LENGTHS[0], None), (1, LENGTHS[3], None), (3, 11, "right"), (4, 6, "left")):
        batch, size = rows or batch, positions_held or min(length, limit)
        case = {name: text_like(name, value, model, batch, size, generator) for name, value in sample.items()}
        if padding and size > 1:
            pad(case, padding)
        description = f"{batch} x {size}" + (f" padded {padding}" if padding else "")
        for image_size in itertools.islice(image_sizes, 1):
            case[IMAGES] = _images(case[IMAGES], image_size, generator)
            description += f" with images of {pixels(image_size)}"
        yield description, case


def _other_image_sizes(model: TracedModel) -> list[tuple[int, int]]:
    """Image sizes to compare, of a trace in which they vary: smaller and larger than the example's, odd if they may."""
    sizes = model.signature.image_sizes
    if sizes is None or sizes.fixed is not None:
        return []
    height, width = model.example_inputs[IMAGES].shape[2:]
    return [sizes.fitting((height // 2 + 1, width)), sizes.fitting((width + 5, height + 3))]


def _images(images: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random images of another height and width."""
    return torch.randn(*images.shape[:2], *size, generator=generator).to(images.dtype)


def _held_sizes(model: TracedModel, sample: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Batch size and sequence length that a trace is fixed to; None for one that may vary."""
    texts = [name for name in sample if AXES.get(name, ("", ""))[1:2] == ("sequence_length",)]
    sizes = [model.signature.fixed.get(name, (None, None)) for name in texts]
    rows, lengths = zip(*(size[:2] for size in sizes if len(size) > 1), strict=True) if sizes else ((), ())
    return next(filter(None, rows), None), next(filter(None, lengths), None)


def drop_padding(outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs without padding positions, whose values are undefined.

    Args:
        outputs: Output tensors by name.
        inputs: The inputs from which they were computed.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return dict(outputs)
    if "decoder_input_ids" in inputs:
        aligned = {name for name in outputs if name.startswith("encoder")}
    else:
        aligned = {name for name, value in outputs.items() if value.shape[:2] == mask.shape}
    return {name: value[mask.bool()] if name in aligned else value for name, value in outputs.items()}


def _nested(model: TracedModel, name: str, example: Any, batch: int, generator: torch.Generator) -> Any:
    """Random values with the structure of an example, with another batch size if the trace lets it vary."""

    def fresh(keys: KeyPath, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        rows, *_ = (*model.signature.fixed.get(path_of(name, keys), ()), None)
        return like(value, rows or batch, None, generator)

    return tree_map_with_path(fresh, example)
