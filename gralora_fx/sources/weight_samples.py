"""A sample of the weights of two model directories compared: some values of every tensor that both have, by its key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import CheckpointError
from gralora_fx.sources.safetensors_files import FLOATS, StoredTensor, read_layout

_BYTES = np.dtype(np.uint8)
_READ = 64  # bytes at each place of two tensors of one dtype
_VALUES = 8  # values at each place of two tensors of different dtypes


@dataclass(frozen=True)
class WeightComparison:
    """How many tensors two directories have in common, and how many of these have other values."""

    common: int
    differing: int


def differing_weights(one: Path, other: Path) -> WeightComparison | None:
    """Compare the safetensors files of two directories.

    A tensor of another dtype counts as equal where its values are within the coarser one's rounding.

    Args:
        one: A model's directory.
        other: Another one's.

    Returns:
        What was found; None where a directory has no safetensors files that can be read, or both have fewer than half
        of their tensors in common.
    """
    try:
        first, second = _tensors(one), _tensors(other)
        common = [key for key in first if key in second]
        if not common or 2 * len(common) < min(len(first), len(second)):
            return None
        return WeightComparison(len(common), sum(not _agree(first[key], second[key]) for key in common))
    except (CheckpointError, OSError):  # whoever loads the files says what is wrong with them
        return None


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a model by key."""
    files = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    return {key: tensor for file in files for key, tensor in read_layout(file).tensors.items()}


def _agree(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same shape, and the same values at the places that are read."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        pairs = zip(_samples(one, _BYTES, _READ), _samples(other, _BYTES, _READ), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)
    if one.dtype not in FLOATS or other.dtype not in FLOATS:
        return False
    pairs = zip(_samples(one, FLOATS[one.dtype], _VALUES), _samples(other, FLOATS[other.dtype], _VALUES), strict=True)
    return all(np.allclose(a.astype(float), b.astype(float), rtol=2**-6, atol=1e-6) for a, b in pairs)


def _samples(tensor: StoredTensor, dtype: np.dtype[Any], most: int) -> list[NDArray[Any]]:
    """Up to `most` values from the beginning and from the middle of a tensor, whose bytes are read as of `dtype`."""
    count = tensor.nbytes // dtype.itemsize
    taken = min(count, most)
    parts = [np.empty(taken, dtype) for _ in range(2)]
    for part, place in zip(parts, (0, (count - taken) // 2 // 8 * 8), strict=True):
        tensor.read_into(part, place * dtype.itemsize)
    return parts
