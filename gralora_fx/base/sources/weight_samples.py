"""A sample of the weights of two model directories compared: some values of every tensor that both have, by its key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.packed_tensors import PackedTensor
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor, read_layout
from gralora_fx.base.sources.saved_weights import read_weights, unpacked_in
from gralora_fx.errors import CheckpointError

_BYTES = np.dtype(np.uint8)
_READ = 64  # bytes at each place of two tensors of one dtype
_VALUES = 8  # values at each place of two tensors of different dtypes
_ROUNDED = 2**14  # values of two weights of which one is in few bits: whole blocks of any size
_ROUNDINGS = 0.2  # relative change up to which they are roundings of one weight: each changes it by 0.09 to 0.15
_IN_A_LAYER = re.compile(r"\.\d+\..*\.weight$")


@dataclass(frozen=True)
class WeightComparison:
    """How the weights of two directories differ.

    Attributes:
        common: How many tensors they have in common.
        differing: How many of these have other values.
        change: Of weights that are in few bits in one of them, the norm of the difference relative to the norm, over
            all values that were compared; None where there are none.
    """

    common: int
    differing: int
    change: float | None = None


def stored_quantization(directory: Path) -> BaseQuantization | None:
    """How the weights of a directory are quantized; None of floats, and where they cannot be read."""
    try:
        return read_weights(directory).quantization
    except CheckpointError:  # whoever loads the files says what is wrong with them
        return None


def differing_weights(
    one: Path, other: Path, how: BaseQuantization | None = None, other_how: BaseQuantization | None = None
) -> WeightComparison | None:
    """Compare the safetensors files of two directories.

    A tensor of another dtype counts as equal where its values are within the coarser one's rounding.
    """
    try:
        first, second = _tensors(one), _tensors(other)
        common = [key for key in first if key in second]
        if not common or 2 * len(common) < min(len(first), len(second)):
            return None
        return _comparison([(first[key], second[key]) for key in common], how, other_how)
    except (CheckpointError, OSError):  # whoever loads the files says what is wrong with them
        return None


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a model by key."""
    files = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    return dict(unpacked_in(directory, {key: t for file in files for key, t in read_layout(file).tensors.items()}))


def _comparison(
    pairs: Sequence[tuple[StoredTensor, StoredTensor]], how: BaseQuantization | None, other_how: BaseQuantization | None
) -> WeightComparison:
    """The comparison of tensors of the same keys."""
    packed = [tuple(isinstance(tensor, PackedTensor) for tensor in pair) for pair in pairs]
    is_turned = any(  # by transformers' Conv1D, whose weights bitsandbytes stores transposed
        flags[0] != flags[1] and a.shape == b.shape[::-1] != b.shape
        for (a, b), flags in zip(pairs, packed, strict=True)
    )
    differing, difference, norm = 0, 0.0, 0.0
    for (a, b), flags in zip(pairs, packed, strict=True):
        is_matrix = len(a.shape) == 2 and _IN_A_LAYER.search(a.key) is not None
        if not any(flags) and not (is_matrix and (how or other_how)):
            differing += not _agree(a, b)
            continue
        if is_turned and flags[0] != flags[1]:
            a, b = (t.turned() if isinstance(t, PackedTensor) else t for t in (a, b))
        if a.shape != b.shape:
            differing += 1
            continue
        one, other = _first_values(a, how), _first_values(b, other_how)
        squares = float(np.square(one - other).sum()), float(np.square(one).sum())
        difference, norm = difference + squares[0], norm + squares[1]
        differing += squares[0] > _ROUNDINGS**2 * squares[1]
    return WeightComparison(len(pairs), differing, (difference / norm) ** 0.5 if norm else None)


def _first_values(tensor: StoredTensor, how: BaseQuantization | None) -> NDArray[Any]:
    """The first values of a weight, rounded if that is asked for and they are not.

    Their blocks are those of the whole weight, but for scales that are quantized too, and weights of `Conv1D`.
    """
    values = np.empty(min(tensor.numel, _ROUNDED), FLOATS[tensor.dtype])
    tensor.read_into(values)
    if how is not None and not isinstance(tensor, PackedTensor):
        values = how.rounded(values)
    return values.astype(float)


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
