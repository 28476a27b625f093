"""Image embeddings in place of the first tokens of prompts and rows, and the inputs beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.features.images.cross_rows import CrossRows, cross_given, size_of
from gralora_fx.features.images.tasks_and_inputs import (
    DEEPSTACK,
    FEATURES,
    GIVEN_PLACES,
    GRID,
    IMAGE_FEATURES,
    KEYS,
    PREFIX,
    SEEN,
    STEP_INPUTS,
    VALUES,
)
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.engine.session_decoders import GivenRows
from gralora_fx.run.generate.prompts import Prompts
from gralora_fx.run.sessions.ort_values import DTYPES, as_array, optional_arguments, plain_array

_BEYOND = 2**64  # above every token
Given = dict[str, NDArray[Any]]  # of a row: see `ImageRows.begin`
Outputs = dict[str, NDArray[Any]]  # of the vision encoder
_SPECS = {each.name: each for each in STEP_INPUTS}


def with_images(prompts: Prompts, embeds: Any) -> Prompts:
    """Return prompts with embeddings `[tokens, hidden]`, or a dict of them and other inputs, for each or the one."""
    given = [embeds] if prompts.is_single else list(embeds) if isinstance(embeds, (list, tuple)) else None
    if given is None or len(given) != len(prompts.rows):
        raise ServingError(
            f"inputs_embeds has to be a list of {len(prompts.rows)}, one for each prompt, None for one of text alone"
        )
    images: list[Source | None] = []
    for index, each in enumerate(given):
        named = each if isinstance(each, Mapping) or each is None else {EMBEDS: each}
        arrays = {} if named is None else {name: plain_array(name, value) for name, value in named.items()}
        images.append(None if named is None else {name: _of_one_row(name, array) for name, array in arrays.items()})
        count, wanted = len(arrays[EMBEDS]) if EMBEDS in arrays else None, len(prompts.rows[index])
        if count is not None and count != wanted:
            raise ServingError(
                f"prompt {index} has {wanted} tokens and inputs_embeds {count}; give embeddings of all of its tokens"
            )
    return replace(prompts, given=images)


def _of_one_row(name: str, array: NDArray[Any]) -> NDArray[Any]:
    axis = _SPECS[name].axis if name in _SPECS else 0
    return array if axis is None else np.expand_dims(array, min(axis, array.ndim))


class ImageRows(GivenRows):
    """The rows of a decoder that begin with embeddings in place of tokens."""

    prompts_with = staticmethod(with_images)

    def __init__(self, session: Any) -> None:
        self._taken = {value.name: value for value in optional_arguments(session)}
        self._rows: dict[int, Mapping[str, NDArray[Any]]] = {}
        self._places: dict[int, NDArray[np.bool_]] = {}  # of a row: which of its first tokens are given
        self._cross = CrossRows()
        self._of_text = {name: self._absent(name, 1, 1) for name in self._taken}
        # types of tokens, by which those of an image see each other
        self._types = [name for name in self._taken if _SPECS[name].follows != IDS]

    def begin(self, row: int, source: Mapping[str, Any] | None) -> None:
        """Note what a row begins with: `inputs_embeds [1, tokens, hidden]`, and what the model takes with it.

        `given_places [1, tokens]` says which of the tokens they are for; without it they are for all.
        """
        self._rows.pop(row, None)
        self._places.pop(row, None)
        self._cross.begin(row, {})
        if source is None:
            return
        if not isinstance(source, Mapping) or EMBEDS not in source:
            raise ServingError(f"inputs in place of token ids start with {EMBEDS}, but got {shown(source)}")
        places = source.get(GIVEN_PLACES)
        source = {name: value for name, value in source.items() if name != GIVEN_PLACES}
        if unknown := [str(name) for name in source if name not in self._taken]:
            raise ServingError(f"unknown {', '.join(unknown)}; beside ids the model takes {listed(self._taken)}")
        if self._types and self._types[0] != PREFIX and places is None and self._types[0] not in source:
            raise ServingError(
                f"the tokens of an image see each other in this model; give {self._types[0]}, 1 for those of images, "
                f"with {EMBEDS}"
            )
        arrays = {name: as_array(name, value, self._taken[name]) for name, value in source.items()}
        for name in self._types:
            if name not in arrays:
                types = np.ones(arrays[EMBEDS].shape[:2]) if name == PREFIX else places
                arrays[name] = np.asarray(types, DTYPES[self._taken[name].type])
        cross = {name: arrays.pop(name) for name in (KEYS, VALUES) if name in arrays}
        sizes = {name: array.shape[_SPECS[name].axis or 0 :][:2] for name, array in arrays.items()}
        rows, count = sizes[EMBEDS]
        if wrong := next((name for name, size in sizes.items() if size != (1, count)), None):
            what = f"{sizes[wrong][0]} rows of {sizes[wrong][1]} tokens"
            raise ServingError(f"{wrong} is of {what}, and a row's {EMBEDS} of {rows} of {count}; give one of each row")
        if SEEN in arrays:
            cross[SEEN] = arrays.pop(SEEN)
        self._cross.begin(row, cross)
        self._rows[row] = arrays
        self._places[row] = np.ones(count, bool) if places is None else np.asarray(places, bool).reshape(-1)
        if len(self._places[row]) != count:
            raise ServingError(f"{GIVEN_PLACES} is of {len(self._places[row])} tokens, and {EMBEDS} of {count}")

    def joins(self, row: int, stop: int) -> bool:
        """Return whether a place is in the middle of an image whose tokens see each other."""
        if not self._types or row not in self._rows:
            return False
        types = self._rows[row][self._types[0]][0]
        return stop < len(types) and bool(types[stop - 1]) and bool(types[stop])

    def size(self, source: Mapping[str, Any]) -> int:
        """Return the bytes of the keys and values of a row's images."""
        return size_of(source) if isinstance(source, Mapping) else 0

    def run_key(self, row: int) -> int | None:
        """Return the number of tiles of a row's images, if layers attend to them."""
        return self._cross.tiles(row)

    def names(self, row: int) -> Mapping[int, int] | None:
        """Return digests of the inputs in place of a row's tokens, by position; text has its ids."""
        own, places = self._rows[row], self._places[row]
        # what was read of an image depends on the text after it, or what was read of a text on its images
        if PREFIX in own or self._cross.tiles(row) is not None:
            return None
        by_position = {name: self._by_position(name, array)[0] for name, array in own.items()}
        if (grid := by_position.get(GRID)) is not None:
            largest = np.maximum.accumulate(grid.max(1))
            expected = np.concatenate([[0], largest[:-1] + 1])
            if (grid[~places] != expected[~places, None]).any():
                return None
        arrays = [np.ascontiguousarray(each) for _, each in sorted(by_position.items())]
        names: dict[int, int] = {}
        for position in np.flatnonzero(places).tolist():
            digest = hashlib.blake2b(digest_size=16)
            for each in arrays:
                digest.update(each[position])
            names[position] = _BEYOND + int.from_bytes(digest.digest(), "big")
        return names

    def arrays(
        self, read: Mapping[int, NDArray[np.int64]], before: Mapping[int, int], rows: range, ids: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return what a step is fed of images."""
        given = [row for row in read if row in self._rows]
        if not given:
            return dict(self._of_text)
        total = max(before[row] + len(tokens) for row, tokens in read.items())
        feed = {
            name: self._absent(name, len(ids), total if name in self._types else ids.shape[1]) for name in self._taken
        } | self._cross.arrays(read, before, rows, ids.shape[1])
        for row in given:
            start, stop = before[row], before[row] + len(read[row])
            place, own = row - rows.start, self._rows[row]
            count = own[EMBEDS].shape[1]
            given_now = self._places[row][start:stop]
            ids[place, : len(given_now)][given_now] = GIVEN
            for name, array in own.items():
                target, known = self._by_position(name, feed[name])[place], self._by_position(name, array)[0]
                part = known[0 if name in self._types else start : stop]
                target[: len(part)] = part
                if name == GRID:  # of text after an image, from the largest on
                    target[len(part) : stop - start] = (
                        known.max() + 1 - count + np.arange(start, stop)[len(part) :, None]
                    )
        return feed

    def _absent(self, name: str, rows: int, length: int) -> NDArray[Any]:
        """Return the values that stand for text, in a number of rows and positions."""
        spec, value = _SPECS[name], self._taken[name]
        sizes = [1 if axis in spec.others else size for axis, size in enumerate(value.shape)]
        if spec.axis is not None:
            sizes[spec.axis : spec.axis + 2] = rows, length
        return np.full(sizes, spec.absent, DTYPES[value.type])

    def _by_position(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """`[rows, positions, ...]`, in the array's own memory."""
        axis = _SPECS[name].axis or 0
        return np.moveaxis(array, (axis, axis + 1), (0, 1))


def given_of(
    places: NDArray[np.bool_], outputs: Sequence[Outputs], grids: NDArray[np.int64] | None, merge: int
) -> Given:
    """Return what a row is given of its prompt's images, each array of all tokens of the prompt.

    `places [tokens]` are those that stand for images, `outputs` what was made of each image, `grids [images, 3]`
    frames, height and width in patches (None without positions of them), and `merge` patches on a side of a token.
    """
    features = np.concatenate([each[IMAGE_FEATURES] for each in outputs])
    embeds = np.zeros((1, len(places), features.shape[1]), features.dtype)
    embeds[0, places] = features
    given: Given = {EMBEDS: embeds, GIVEN_PLACES: places[None]}
    if KEYS in outputs[0]:
        given |= cross_given(places, outputs)
    if DEEPSTACK in outputs[0]:
        layers = np.concatenate([each[DEEPSTACK] for each in outputs], axis=1)
        given[FEATURES] = np.zeros((len(layers), *embeds.shape), layers.dtype)
        given[FEATURES][:, 0, places] = layers
    if grids is not None:
        given[GRID] = grid_positions(places, grids, merge)[:, None]
    return given


def grid_positions(places: NDArray[np.bool_], grids: NDArray[np.int64], merge: int) -> NDArray[np.int64]:
    """Return positions in time, height and width of a prompt's tokens `[3, tokens]`, as Qwen2-VL's models count.

    Text counts on from the largest position before it, alike in all three; the tokens of an image (`places [tokens]`)
    count its rows and columns from there. `grids [images, 3]` are in patches, `merge` of them on a side of a token.
    """
    positions = np.empty((3, len(places)), np.int64)
    sizes = iter([(frames, height // merge, width // merge) for frames, height, width in grids.tolist()])
    index = counted = 0
    while index < len(places):
        if not places[index]:
            positions[:, index] = counted
            index, counted = index + 1, counted + 1
            continue
        size = next(sizes)
        count = int(np.prod(size))
        positions[:, index : index + count] = counted + np.indices(size).reshape(3, -1)
        index, counted = index + count, counted + max(size)
    return positions
