"""Keys, values and visible tiles, by row, of images that layers of a decoder attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError
from gralora_fx.features.images.tasks_and_inputs import KEYS, SEEN, TILES, VALUES

Arrays = Mapping[str, NDArray[Any]]
_TILE_AXES = {KEYS: 4, VALUES: 3}


def seen_by(places: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return which images each token of a prompt sees `[tokens, images]`, given their places.

    An image is seen from its place up to that of the next; images whose places follow each other, as far as the last.
    """
    starts = np.flatnonzero(places).tolist()
    seen, end = np.zeros((len(places), len(starts)), np.int64), len(places)
    for image in reversed(range(len(starts))):
        start, next_start = starts[image], starts[image + 1] if image + 1 < len(starts) else len(places)
        end = end if next_start == start + 1 else next_start
        seen[start:end, image] = 1
    return seen


def cross_given(places: NDArray[np.bool_], outputs: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
    """Return the keys, values and mask of a prompt with images, whose tokens stand at `places [tokens]`."""
    given = {name: _joined([each[name] for each in outputs], axis) for name, axis in _TILE_AXES.items()}
    tiles = np.stack([each[TILES] for each in outputs]).astype(np.int64)
    seen = (seen_by(places)[:, :, None] * tiles).reshape(1, len(places), 1, -1)
    return {**given, SEEN: seen}


class CrossRows:
    """The rows of a decoder that attend to images: each has a set of them, which rows of the same images share."""

    def __init__(self) -> None:
        self._rows: dict[int, Arrays] = {}
        # of rows that read last, by their number of tiles: their sets, and these joined
        self._joined: dict[int, tuple[list[int], Arrays]] = {}

    def begin(self, row: int, own: Arrays) -> None:
        """Note what a row is given; nothing if it is of text alone."""
        if self._rows.pop(row, None) is not None:
            self._joined = {}
        if not own:
            return
        shapes = {name: array.shape for name, array in own.items()}
        tiles = {shapes[name][axis] for name, axis in _TILE_AXES.items() if name in shapes}
        if own.keys() != {*_TILE_AXES, SEEN} or not shapes[SEEN][1] or len({*tiles, shapes[SEEN][3]}) != 1:
            raise ServingError(
                f"a row with images takes {KEYS}, {VALUES} and {SEEN} of as many tiles, but got {shapes}"
            )
        if {shapes[KEYS][1], shapes[VALUES][1], shapes[SEEN][0], shapes[SEEN][2]} != {1}:
            raise ServingError(f"a row has one set of images, but got {shapes}; give those of each row")
        self._rows[row] = own

    def tiles(self, row: int) -> int | None:
        """Return the number of tiles of a row's images; None of text alone."""
        return self._rows[row][SEEN].shape[3] if row in self._rows else None

    def arrays(
        self, read: Mapping[int, Sized], before: Mapping[int, int], rows: range, length: int
    ) -> dict[str, NDArray[Any]]:
        """Return a step's keys, values and mask; none if no reading row has images. All such rows have as many tiles.

        The last token of a prompt says what its answer sees.
        """
        own = {row: self._rows[row] for row in read if row in self._rows}
        if not own:
            return {}
        sets = {id(each[KEYS]): each for each in own.values()}
        of_set, (seen, *_) = list(sets), (each[SEEN] for each in own.values())
        if self._joined.get(seen.shape[3], ([],))[0] != of_set:
            parts = {name: [each[name] for each in sets.values()] for name in _TILE_AXES}
            self._joined[seen.shape[3]] = of_set, {name: _joined(each, 1) for name, each in parts.items()}
        mask = np.full((len(rows), length, len(sets), seen.shape[3]), -1, seen.dtype)
        for row, each in own.items():
            prompt = each[SEEN][0, :, 0]
            positions = np.minimum(np.arange(before[row], before[row] + len(read[row])), len(prompt) - 1)
            mask[row - rows.start, : len(positions), of_set.index(id(each[KEYS]))] = prompt[positions]
        return {**self._joined[seen.shape[3]][1], SEEN: mask}


def _joined(parts: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """Join arrays; one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def size_of(source: Mapping[str, Any]) -> int:
    """Return the bytes of a row's keys and values, and of their copy among those of other rows."""
    total: int = 2 * sum(source[name].nbytes for name in _TILE_AXES if hasattr(source.get(name), "nbytes"))
    return total
