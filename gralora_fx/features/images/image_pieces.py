"""Outputs of an image processor, cut into calls of the vision encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.features.images.tasks_and_inputs import (
    ASPECT,
    BATCH_IMAGES,
    GRID_THW,
    IMAGE_SIZES,
    IMAGES,
    PATCH_PLACES,
    PIXEL_MASK,
)
from gralora_fx.features.images.tile_packing import TilePacking

Pieces = tuple[list[dict[str, NDArray[Any]]], tuple[int, int] | None]  # of an image or a tile, and the image's size


def pieces_of(made: Mapping[str, Any], ranks: Mapping[str, int], packing: TilePacking | None) -> Iterator[Pieces]:
    """Yield what is read at once of the pixels of each image, such as tiles that it is cut into, and its size.

    Args:
        made: What the processor made of one prompt's images.
        ranks: Numbers of axes of the vision encoder's inputs, by name.
        packing: How tiles are laid out; None for a model that takes their features one after the other.
    """
    pixels = np.asarray(made[IMAGES])
    sizes = np.asarray(made[IMAGE_SIZES]).tolist() if IMAGE_SIZES in made else []
    if GRID_THW in ranks:
        grids = np.asarray(made[GRID_THW])
        ends = np.cumsum(grids.prod(1))[:-1]
        for grid, own in zip(grids, np.split(pixels, ends), strict=True):
            yield [{IMAGES: own, GRID_THW: grid[None]}], None
    elif PATCH_PLACES in ranks:
        for own, places in zip(pixels, np.asarray(made[PATCH_PLACES]), strict=True):
            is_patch = (places >= 0).all(-1)
            yield [{IMAGES: own[is_patch], PATCH_PLACES: places[is_patch]}], None
    elif ASPECT in ranks:
        for own, ratio in zip(pixels[0], np.asarray(made[ASPECT])[0], strict=True):
            yield [{IMAGES: own, ASPECT: ratio.reshape(1, 1)}], None
    elif ranks[IMAGES] == 3:  # of any size, which a processor pads to that of the largest
        images = pixels.reshape(-1, *pixels.shape[-3:])
        for image, (height, width) in zip(images, sizes or _unmasked(made[PIXEL_MASK]), strict=True):
            yield [{IMAGES: image[:, :height, :width]}], None
    elif packing is not None:
        is_cut = len(sizes) == 1 or BATCH_IMAGES not in made
        for tiles, size in zip(pixels, sizes, strict=True):
            count = packing.count(tuple(size)) if is_cut else 1
            yield [{IMAGES: tile[None]} for tile in tiles[:count]], tuple(size)
    else:
        for tile in pixels.reshape(-1, *pixels.shape[-3:]):
            yield [{IMAGES: tile[None]}], None


def _unmasked(mask: Any) -> list[tuple[int, int]]:
    """Return the height and width of each image of which a mask `[batch, images, height, width]` hides the rest."""
    masks = np.asarray(mask).reshape(-1, *np.shape(mask)[-2:]).astype(bool)
    return [(int(each.any(1).sum()), int(each.any(0).sum())) for each in masks]
