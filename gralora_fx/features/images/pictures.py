"""Pictures on which a quantized vision encoder is rounded and measured, as the model's own processor reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import first_line
from gralora_fx.exporters.artifact.tokenizer_files import loaded_tokenizer
from gralora_fx.features.images.image_pieces import pieces_of
from gralora_fx.features.images.processors import processor_beside
from gralora_fx.features.images.tasks_and_inputs import IMAGES
from gralora_fx.features.images.tile_packing import TilePacking

_SIZES = ((320, 240), (240, 320), (256, 256), (384, 160))  # width and height
_COUNT, _VALUES = 8, 3 * 2**20  # the most pictures or tiles of them, and about the most values of their pixels
_GRIDS = (3, 6, 12, 24, 48, 96)  # cells on a side of smooth noise, which is weaker the finer it is, as in photographs
_SHAPES, _STROKES = 6, 40  # rectangles of a picture, and strokes like those of letters


def read_pictures(part: TracedModel, tokenizer: Any, seed: int) -> tuple[list[dict[str, Tensor]], str]:
    """Return inputs of the vision encoder made of drawn pictures, none without a processor; and their description."""
    loaded = None if tokenizer is None else loaded_tokenizer(tokenizer)
    named = getattr(loaded, "name_or_path", None)
    processor = None if loaded is None else processor_beside(loaded, [named] if named else [])
    if processor is None:
        return [], "random pixels, as no processor is given"
    found: list[dict[str, Tensor]] = []
    try:
        for inputs in _read(part, processor, seed):
            found.append(inputs)
            if len(found) == _COUNT or sum(each[IMAGES].numel() for each in found) >= _VALUES:
                break
    except Exception as error:  # noqa: BLE001  # processors raise what they like
        return [], f"random pixels, as the processor reads no pictures ({first_line(error)})"
    return found, f"{len(found)} drawn pictures"


def _read(part: TracedModel, processor: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield an input for each drawn picture, or for each tile of one."""
    example, config = part.graph_inputs, {} if part.config is None else part.config.to_dict()
    ranks, pixels = {name: value.ndim for name, value in example.items()}, example[IMAGES]
    packing = TilePacking.of(config) if "image_grid_pinpoints" in config else None
    for picture in _drawn(np.random.default_rng(seed)):
        made = dict(processor.image_processor(images=[picture], return_tensors="np"))
        for pieces, _ in pieces_of(made, ranks, packing):
            inputs = {name: torch.from_numpy(np.array(value)) for name, value in pieces[-1].items()}
            if pixels.ndim == 4 and inputs[IMAGES].shape[1:] != pixels.shape[1:]:
                raise ValueError(f"it makes tiles of {list(inputs[IMAGES].shape[1:])}")
            yield {**inputs, IMAGES: inputs[IMAGES].to(pixels.dtype)}


def _drawn(generator: np.random.Generator) -> Iterator[Any]:
    """Draw pictures with smooth colours, edges and strokes."""
    from PIL import Image

    for index in range(_COUNT):
        width, height = _SIZES[index % len(_SIZES)]
        picture = np.zeros((height, width, 3))
        for cells in _GRIDS:
            noise = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            picture += (np.asarray(smooth) - 128.0) * _GRIDS[0] / cells
        for side in (*[height // 3] * _SHAPES, *[height // 24] * _STROKES):
            top, left = generator.integers(0, height - side), generator.integers(0, width - side)
            area = picture[top : top + generator.integers(1, side + 1), left : left + generator.integers(1, side + 1)]
            area[:] = generator.uniform(-128, 128, 3)
        yield Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8))
