"""The base model's own weights, to find an initializer by its values and to check one that was found by its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import CheckpointError, MergeError, TraceError
from gralora_fx.exporters.folding.initializers import ProductWeight, dtype_of, read_rows, rows_and_columns
from gralora_fx.sources.model_files import resolve_directory
from gralora_fx.sources.safetensors_files import read_weights
from gralora_fx.sources.same_base import read_config_fields

_TABLES = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")
_READ_AT_ONCE = 2**22  # bytes


class BaseWeights:
    """The safetensors files of a base model; a tensor is read when it is asked for."""

    def __init__(self, base: str | Path) -> None:
        """Read the headers.

        Args:
            base: Local directory or hub id.

        Raises:
            CheckpointError: There are no safetensors files, or they cannot be read.
        """
        self.directory = resolve_directory(base, CheckpointError)
        self._stored = read_weights(self.directory).tensors
        config = read_config_fields(self.directory) or {}
        self._is_tied = bool(config.get("tie_word_embeddings", True))

    def weight(self, path: str, features: tuple[int, int]) -> NDArray[Any]:
        """The weight `[out, in]` of a layer.

        Args:
            path: The layer.
            features: Its widths in and out.

        Raises:
            MergeError: The base has no such weight, or one of another shape.
        """
        inputs, outputs = features
        key = self._key(f"{path}.weight", outputs)
        if key is None:
            raise MergeError(f"{self.directory} holds no {path}.weight; give the base model of the adapter")
        values = self._stored[key].array()
        if tuple(values.shape) == (outputs, inputs):
            return values
        if tuple(values.shape) == (inputs, outputs):  # transformers' Conv1D
            return values.T
        raise MergeError(
            f"{key} of {self.directory} has shape {list(values.shape)}, but the adapter is for a layer of {inputs} "
            f"inputs and {outputs} outputs; give the base model of the adapter"
        )

    def _key(self, name: str, outputs: int) -> str | None:
        return self._key_among({key: key for key in self._stored}, name, outputs) or self._key_among(
            self._renamed, name, outputs
        )

    @cached_property
    def _renamed(self) -> Mapping[str, str]:
        """The keys by the names that transformers gives the tensors when it loads the model; parts are left out."""
        from gralora_fx.loading.models import make_empty  # it imports transformers
        from gralora_fx.sources.streamed_models import keys_by_name

        try:
            model = make_empty(self.directory, None)
        except TraceError:
            return {}
        keys, parts = keys_by_name(model, self._stored)
        return {name: key for name, key in keys.items() if key not in parts}

    def _key_among(self, keys: Mapping[str, str], name: str, outputs: int) -> str | None:
        """The key of a weight among keys by their names."""
        if name in keys:
            return keys[name]
        ends = [key for other, key in keys.items() if other.endswith(f".{name}") or name.endswith(f".{other}")]
        if not ends and self._is_tied and name.count(".") == 1:  # a head: its weight is that of the embedding
            names = tuple(f"{table}.weight" for table in _TABLES)
            tables = [key for other, key in keys.items() if other.endswith(names)]
            ends = [key for key in tables if self._stored[key].shape[0] == outputs]
        return ends[0] if len(ends) == 1 else None


def find_values(weights: Iterable[ProductWeight], values: NDArray[Any]) -> Iterator[tuple[ProductWeight, int]]:
    """The weights that hold a matrix, alone or beside others, and its first output feature there.

    Shapes are compared first, then the values of one input feature, then all.

    Args:
        weights: Where to look; quantized ones are left out.
        values: `[out, in]`.
    """
    outputs, inputs = values.shape
    for weight in weights:
        if weight.storage == "float" and weight.in_features == inputs and weight.out_features >= outputs:
            first = values[:, 0].astype(dtype_of(weight.value))
            starts = _starts(_first_input(weight), first)
            yield from ((weight, start) for start in starts if holds(weight, start, values))


def holds(weight: ProductWeight, start: int, values: NDArray[Any]) -> bool:
    """Whether a weight holds a matrix, rounded to its dtype, from an output feature on; compared in pieces.

    Args:
        weight: A weight of floats.
        start: Output feature of the weight at which the matrix begins.
        values: `[out, in]`.
    """
    stored, first, features = values, start, slice(None)
    if weight.transposed:
        stored, first, features = values.T, 0, slice(start, start + len(values))
    dtype = dtype_of(weight.value)
    _, columns = rows_and_columns(weight.value)
    step = max(1, _READ_AT_ONCE // (columns * dtype.itemsize))
    for row in range(0, len(stored), step):
        part = stored[row : row + step].astype(dtype)
        if not np.array_equal(read_rows(weight.value, first + row, first + row + len(part))[:, features], part):
            return False
    return True


def _first_input(weight: ProductWeight) -> NDArray[Any]:
    """The weight's values for its first input feature, `[out]`."""
    if weight.transposed:
        return read_rows(weight.value, 0, 1)[0]  # type: ignore[no-any-return]
    step = max(1, _READ_AT_ONCE // (weight.in_features * dtype_of(weight.value).itemsize))
    rows = range(0, weight.out_features, step)
    parts = [read_rows(weight.value, row, min(row + step, weight.out_features))[:, 0].copy() for row in rows]
    return np.concatenate(parts)


def _starts(row: NDArray[Any], part: NDArray[Any]) -> list[int]:
    """Where a vector occurs in another."""
    last = len(row) - len(part) + 1
    candidates: list[int] = np.flatnonzero(row[:last] == part[0]).tolist()
    return [start for start in candidates if np.array_equal(row[start : start + len(part)], part)]
