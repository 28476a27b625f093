"""Features of an image's tiles laid out as the image, without what pads it, as LLaVA-NeXT's models do.

features of the whole image, then of tiles row by row, and an embedding that ends a line
    --packed--> the whole image's, then those of the tiles' picture line by line
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGER = 1.1  # so much larger than the most on a side, a picture is made smaller


@dataclass(frozen=True)
class TilePacking:
    """Layout of an image's tiles in a prompt."""

    pinpoints: tuple[tuple[int, int], ...]  # heights and widths that an image is resized to: the closest
    tile: int  # pixels on a side of a tile
    side: int  # features on a side of a tile
    most: int | None  # the most tiles whose features are kept as they are; None for all

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TilePacking:
        """Return the layout of a model with a configuration."""
        vision, most = config["vision_config"], config.get("vision_aspect_ratio")
        tile = vision["image_size"]
        pinpoints = tuple((height, width) for height, width in config["image_grid_pinpoints"])
        count = None if most is None else int(most.removeprefix("anyres_max_"))
        return cls(pinpoints, tile, tile // vision["patch_size"], count)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return into how many tiles an image is cut, in height and width."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(size, list(self.pinpoints))
        return height // self.tile, width // self.tile

    def count(self, size: tuple[int, int]) -> int:
        """Return how many tiles a processor makes of an image, with that of the whole."""
        rows, columns = self.grid(size)
        return 1 + rows * columns

    def packed(self, features: NDArray[Any], newline: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
        """Return features `[tiles, positions, hidden]` of an image, the whole first, as `[tokens, hidden]`."""
        whole, tiles = features[0], features[1:]
        if not len(tiles):
            return np.concatenate([whole, newline])
        rows, columns = self.grid(size)
        picture = tiles.reshape(rows, columns, self.side, self.side, -1).swapaxes(1, 2)
        picture = _unpadded(picture.reshape(rows * self.side, columns * self.side, -1), size)
        if self.most is not None:
            height, width = picture.shape[:2]
            ratio = math.sqrt(height * width / (self.most * self.side**2))
            if ratio > _LARGER:
                picture = _resized(_resized(picture, int(height // ratio), 0), int(width // ratio), 1)
        ends = np.broadcast_to(newline[None], (len(picture), 1, picture.shape[2]))
        lines = np.concatenate([picture, ends.astype(picture.dtype)], axis=1)
        return np.concatenate([whole, lines.reshape(-1, lines.shape[2])])


def _unpadded(picture: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Cut off what pads a picture `[height, width, hidden]` of an image of another shape."""
    height, width = picture.shape[:2]
    if size[1] / size[0] > width / height:
        cut = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return picture[cut : height - cut]
    cut = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return picture[:, cut : width - cut]


def _resized(picture: NDArray[Any], length: int, axis: int) -> NDArray[Any]:
    """Interpolate an axis linearly, as `torch.nn.functional.interpolate` does by default."""
    known = picture.shape[axis]
    places = np.maximum((np.arange(length) + 0.5) * (known / length) - 0.5, 0)
    low = places.astype(np.int64)
    high = np.minimum(low + 1, known - 1)
    weights = (places - low).astype(picture.dtype).reshape([-1 if each == axis else 1 for each in range(3)])
    below, above = picture.take(low, axis), picture.take(high, axis)
    return np.asarray(below * (1 - weights) + above * weights)
