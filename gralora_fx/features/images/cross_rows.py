"""What rows are given of images that layers of a decoder attend to: keys, values, and which tiles a token sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.features.images.tasks_and_inputs import KEYS, SEEN, TILES, VALUES

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


def cross_given(places: NDArray[np.bool_], outputs: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return the keys, values and mask of a prompt with images, whose tokens stand at `places [tokens]`."""
    given = {name: np.concatenate([each[name] for each in outputs], axis) for name, axis in _TILE_AXES.items()}
    tiles = np.stack([each[TILES] for each in outputs]).astype(np.int64)
    seen = (seen_by(places)[:, :, None] * tiles).reshape(1, len(places), 1, -1)
    return {**given, SEEN: seen}


class CrossRows:
    """The rows of a decoder that attend to images: each has its set of them."""

    def __init__(self) -> None:
        self._rows: dict[int, Mapping[str, NDArray[Any]]] = {}
        self._joined: tuple[tuple[int, ...], dict[str, NDArray[Any]]] = ((), {})  # of the rows that read last

    def begin(self, row: int, own: Mapping[str, NDArray[Any]]) -> None:
        """Note what a row is given; nothing if it is of text alone."""
        self._rows.pop(row, None)
        self._joined = ((), {})
        if own:
            self._rows[row] = own

    def tiles(self, row: int) -> int | None:
        """Return the number of tiles of a row's images; None of text alone."""
        return self._rows[row][SEEN].shape[3] if row in self._rows else None

    def arrays(
        self, read: Mapping[int, Sequence[Any]], before: Mapping[int, int], rows: range, length: int
    ) -> dict[str, NDArray[Any]]:
        """Return a step's keys, values and mask; none if no row that reads has images.

        A row's last token of the prompt says what its answer sees.
        """
        given = tuple(row for row in read if row in self._rows)
        if not given:
            return {}
        if self._joined[0] != given:
            own = [self._rows[row] for row in given]
            joined = {name: [each[name] for each in own] for name in _TILE_AXES}
            self._joined = given, {n: np.concatenate(of, 1) if len(of) > 1 else of[0] for n, of in joined.items()}
        seen = self._rows[given[0]][SEEN]
        mask = np.full((len(rows), length, len(given), seen.shape[3]), -1, seen.dtype)
        for number, row in enumerate(given):
            own = self._rows[row][SEEN][0, :, 0]
            positions = np.minimum(np.arange(before[row], before[row] + len(read[row])), len(own) - 1)
            mask[row - rows.start, : len(positions), number] = own[positions]
        return {**self._joined[1], SEEN: mask}
