"""Weights of a model's directory: its safetensors files as one, quantized tensors as floats, and samples."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.features import parts
from gralora_fx.base.sources.base_quantization import BaseQuantization, packed_quantization
from gralora_fx.base.sources.model_files import MODEL_FILE, read_json_object
from gralora_fx.base.sources.other_formats import of_pickle, pickle_file
from gralora_fx.base.sources.packed_tensors import PackedTensor, packed_tensors
from gralora_fx.base.sources.safetensors_files import FLOATS, Layout, StoredTensor, read_layout
from gralora_fx.errors import CheckpointError

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a model's directory."""

    directory: Path
    shards: tuple[Layout, ...]  # its safetensors files
    has_index: bool  # whether an index maps tensors to files
    others: Mapping[str, StoredTensor] = field(default_factory=dict)  # tensors that replace those of the same keys

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by key; quantized ones are read as floats (see `PackedTensor`)."""
        stored = {key: tensor for shard in self.shards for key, tensor in shard.tensors.items()}
        return {**unpacked_in(self.directory, stored), **self.others}

    @cached_property
    def quantization(self) -> BaseQuantization | None:
        """The weights' quantization; None for floats."""
        first = next(packed_tensors(self.tensors), None)
        return None if first is None or _packed(self.directory) is None else first.quantization

    @contextmanager
    def opened(self) -> Iterator[SavedWeights]:
        """Yield the same weights with their files kept open."""
        with ExitStack() as stack:
            yield replace(self, shards=tuple(stack.enter_context(shard.opened()) for shard in self.shards))


def unpacked_in(directory: Path, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Return stored tensors with the quantized ones as floats, in the dtype that the configuration says.

    Without a configuration, the last parts of tensor names show the format.
    """
    told = _packed(directory)
    for unpacked in parts(
        "stored weights", {key.rpartition(".")[2] for key in stored} if told is None else {told.sign}
    ):
        stored = unpacked(stored, directory, told)
    return stored


def _packed(directory: Path) -> BaseQuantization | None:
    """Return the quantization in a model's configuration; None if there is none."""
    if not (directory / MODEL_FILE).is_file():
        return None
    return packed_quantization(read_json_object(directory / MODEL_FILE, CheckpointError), directory, CheckpointError)


def read_weights(directory: Path) -> SavedWeights:
    """Read the layouts of a model's safetensors files, single or with an index, each checked for completeness."""
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.is_file():  # transformers prefers it too
        return SavedWeights(directory, (read_layout(single),), has_index=False)
    if not index.is_file():
        if (file := pickle_file(directory)) is not None:
            config = directory / MODEL_FILE
            fields = read_json_object(config, CheckpointError) if config.is_file() else {}
            raise CheckpointError(of_pickle(directory, file, fields))
        raise CheckpointError(
            f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "save the model with transformers, as safetensors"
        )
    names = _names_by_key(index)
    files = sorted(set(names.values()))
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}, which {INDEX_NAME} names; copy the model again")
    shards = tuple(read_layout(directory / name) for name in files)
    holder: dict[str, str] = {}
    for shard in shards:
        for key in shard.tensors:
            if key in holder:
                raise CheckpointError(
                    f"{directory}: {key} is in {holder[key]} and in {shard.file.name}; save the model again"
                )
            holder[key] = shard.file.name
    if astray := [key for key, name in names.items() if holder.get(key) != name]:
        raise CheckpointError(
            f"{directory}: {', '.join(astray[:3])} is not in the file that {INDEX_NAME} says; copy the model again"
        )
    return SavedWeights(directory, shards, has_index=True)


def _names_by_key(index: Path) -> dict[str, str]:
    """Read an index: the file name of each tensor."""
    try:
        read = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=functools.partial(_once, index))
        names: dict[str, str] = read["weight_map"]
        outside = sorted({str(name) for name in names.values() if Path(name).name != name})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}); copy or save the model again") from error
    if outside:
        raise CheckpointError(
            f"{index} names {', '.join(outside)}, outside its directory; do not trust it, or save it again"
        )
    return names


def _once(index: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; of a key twice, the parser would take the last silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CheckpointError(f"{index} names {twice} twice; copy the model again, or save it again")
    return found


_BYTES = np.dtype(np.uint8)
_READ = 64  # bytes at each place of two tensors of one dtype
_VALUES = 8  # values at each place of two tensors of different dtypes
_ROUNDED = 2**14  # approximate number of values of two weights, one of them quantized
_BLOCK = 4096  # the largest block of values that are rounded together
_ROUNDINGS = 0.2  # maximum relative change between roundings of one weight: each changes it by 0.09 to 0.15
_IN_A_LAYER = re.compile(r"\.\d+\..*\.weight$")


@dataclass(frozen=True)
class WeightComparison:
    """The difference of two directories' weights."""

    common: int  # number of tensors in common
    differing: int  # number of common tensors with other values
    # for weights quantized in one of them, the norm of the difference relative to the norm, over all compared values;
    # None if there are none
    change: float | None = None


def stored_quantization(directory: Path) -> BaseQuantization | None:
    """Return the quantization of a directory's weights; None for floats or unreadable files."""
    try:
        return read_weights(directory).quantization
    except CheckpointError:  # loading the files reports what is wrong
        return None


def differing_weights(
    one: Path,
    other: Path,
    how: BaseQuantization | None = None,
    other_how: BaseQuantization | None = None,
    *,
    left_out: Callable[[str], bool] | None = None,
) -> WeightComparison | None:
    """Compare the safetensors files of two directories, except tensors whose keys `left_out` selects.

    Tensors of different dtypes are equal if their values agree within the coarser one's rounding.
    """
    try:
        first, second = _tensors(one), _tensors(other)
        common = [key for key in first if key in second and not (left_out is not None and left_out(key))]
        if not common or 2 * len(common) < min(len(first), len(second)):
            return None
        return _comparison([(first[key], second[key]) for key in common], how, other_how)
    except (CheckpointError, OSError):  # loading the files reports what is wrong
        return None


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return a model's tensors by key."""
    files = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    return dict(unpacked_in(directory, {key: t for file in files for key, t in read_layout(file).tensors.items()}))


def _comparison(
    pairs: Sequence[tuple[StoredTensor, StoredTensor]], how: BaseQuantization | None, other_how: BaseQuantization | None
) -> WeightComparison:
    """Compare pairs of tensors of equal keys."""
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
    """Return the first rows of a weight, quantized and dequantized if `how` is given and it is not packed.

    Quantization blocks match those of the whole weight, except for double-quantized scales and weights of `Conv1D`.
    """
    rows, columns = tensor.shape
    whole = _BLOCK // math.gcd(_BLOCK, columns)  # rows of whole blocks
    values = np.empty((min(rows, whole * max(1, _ROUNDED // (whole * columns))), columns), FLOATS[tensor.dtype])
    tensor.read_into(values)
    if how is not None and not isinstance(tensor, PackedTensor):
        values = how.rounded(values, f"{tensor.file}, {tensor.key}")
    return values.astype(float)


def _agree(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors have the same shape and equal samples of values."""
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
    """Return up to `most` values, of type `dtype`, from the beginning and from the middle of a tensor."""
    count = tensor.nbytes // dtype.itemsize
    taken = min(count, most)
    parts = [np.empty(taken, dtype) for _ in range(2)]
    for part, place in zip(parts, (0, (count - taken) // 2 // 8 * 8), strict=True):
        tensor.read_into(part, place * dtype.itemsize)
    return parts
