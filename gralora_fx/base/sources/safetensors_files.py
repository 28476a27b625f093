"""Safetensors files of a model: tensors read from their places, and new files with some tensors changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gralora_fx.base.sources.rewriting import BLOCK, Edit, NewFile, Part, StoredBytes, copies, opened_for_reading
from gralora_fx.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_LENGTH, _METADATA = 8, "__metadata__"  # bytes of the length of a header, and its entry that is not a tensor
_EXPONENTS = {FLOATS["F16"]: np.uint16(0x7C00), FLOATS["BF16"]: np.uint16(0x7F80)}  # all set: infinite or not a number


@dataclass(frozen=True)
class StoredTensor(StoredBytes):
    """A tensor in a safetensors file; calling it reads it."""

    key: str
    dtype: str  # safetensors' name of its dtype, such as `BF16`
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Values per row: the product of all axes but the first; a vector is one row."""
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)

    def __call__(self) -> Tensor:
        """Return the values as a memory-mapped tensor; the file is closed again."""
        return _mapped(self.file, [self.key])[self.key]

    def array(self) -> NDArray[Any]:
        """Return the values as a newly allocated numpy array; bfloat16 works too."""
        if self.dtype not in FLOATS:
            raise CheckpointError(f"{self.key} of {self.file} is {self.dtype}, not a float tensor; save it as floats")
        values = np.empty(self.shape, FLOATS[self.dtype])
        self.read_into(values)
        return values

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield a float tensor's values in order, a block at a time; each block overwrites the previous one."""
        dtype = FLOATS[self.dtype]
        kept = np.empty(min(self.numel, BLOCK), dtype)
        with self.opened() as handle:
            for first in range(0, self.numel, BLOCK):
                values = kept[: min(BLOCK, self.numel - first)]
                replace(self, handle=handle).read_into(values, first * dtype.itemsize)
                yield values

    def is_finite(self) -> bool:
        """Return whether all values of a float tensor are finite."""
        return all(extremes_are_finite(values) for values in self.blocks())


def _mapped(file: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, RuntimeError) as error:  # the last one from PyTorch, which opens it again
        raise CheckpointError(f"{file} cannot be read ({error}); copy or save it again") from error


def are_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Return whether two arrays are the same values, perhaps in two precisions: within the coarser one's rounding."""
    if one.shape != other.shape or np.array_equal(one, other):
        return one.shape == other.shape
    dtypes = [_precision(array) for array in (one, other)]
    share = max(float(np.spacing(dtype.type(1))) for dtype in dtypes)
    least = 2.0**-24 if FLOATS["F16"] in dtypes else 0.0
    step = max(1, 2**22 // max(1, one[:1].size))
    parts = (slice(at, at + step) for at in range(0, len(one), step))
    return dtypes[0] != dtypes[1] and all(
        np.allclose(one[part].astype(np.float64), other[part].astype(np.float64), rtol=share, atol=least)
        for part in parts
    )


def _precision(array: NDArray[Any]) -> np.dtype[Any]:
    """Return the dtype of 16 bits that holds an array's values as they are, or its own."""
    with np.errstate(over="ignore"):
        halves = (FLOATS["BF16"], FLOATS["F16"])  # many values of the first are values of the second too
        return next((at for at in halves if np.array_equal(array.astype(at), array)), array.dtype)


def extremes_are_finite(values: NDArray[Any]) -> bool:
    """Return whether all values are finite, by their extremes, which costs less than a test of each value."""
    if not values.size:
        return True
    if values.dtype in _EXPONENTS:  # half precision, whose extremes numpy finds slowly: test the exponent's bits
        exponent = _EXPONENTS[values.dtype]
        return not bool(((values.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


@dataclass(frozen=True)
class Layout:
    """A safetensors file."""

    file: Path
    tensors: Mapping[str, StoredTensor]  # its tensors by key, in the order of the file's header
    metadata: Mapping[str, str]  # the header's metadata
    data: int  # offset of the first tensor's first byte

    def mapped(self) -> dict[str, Tensor]:
        """Return all values by key as memory-mapped tensors, opening the file once."""
        return _mapped(self.file, self.tensors)

    @contextmanager
    def opened(self) -> Iterator[Layout]:
        """Yield the same layout with the file kept open, so that replacing the file does not change what is read."""
        with opened_for_reading(self.file) as handle:
            yield replace(self, tensors={key: replace(t, handle=handle) for key, t in self.tensors.items()})


def read_layout(file: Path) -> Layout:
    """Read a safetensors file's layout; raise if the file is incomplete."""
    try:
        with safe_open(file, framework="np"):  # checks the header and the size of the file
            pass
        with file.open("rb") as opened:
            data = _LENGTH + int.from_bytes(opened.read(_LENGTH), "little")
            fields: dict[str, Any] = json.loads(opened.read(data - _LENGTH))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); it is truncated or not a safetensors file, so copy or save it again"
        ) from error
    metadata = fields.pop(_METADATA, None) or {}
    tensors = {}
    for key, entry in fields.items():
        begin, end = (data + offset for offset in entry["data_offsets"])
        tensors[key] = StoredTensor(file, begin, end, key, entry["dtype"], tuple(entry["shape"]))
    return Layout(file, tensors, metadata, data)


def check_readable(directory: Path) -> None:
    """Check that the safetensors files of a directory have readable headers and are complete."""
    for file in sorted(directory.glob("*.safetensors")):
        read_layout(file)


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a new file that is not simply copied from the same key."""

    dtype: str  # safetensors' name of its dtype
    shape: tuple[int, ...]
    source: StoredTensor | None = None  # the tensor that it is made from; None if the edit supplies all values
    edit: Edit | None = None  # changes the values; None to copy them


@dataclass(frozen=True)
class NewShard:
    """A safetensors file to write."""

    old: Layout  # the file that it replaces
    tensors: Mapping[str, StoredTensor]  # the place of each tensor, in the order of the header
    file: NewFile  # the contents to write

    @property
    def more_bytes(self) -> int:
        """Change in bytes of tensors, compared with the old file."""
        return sum(t.nbytes for t in self.tensors.values()) - sum(t.nbytes for t in self.old.tensors.values())

    @property
    def more_values(self) -> int:
        """Change in number of values, compared with the old file."""
        return sum(t.numel for t in self.tensors.values()) - sum(t.numel for t in self.old.tensors.values())


def rewritten_shard(
    old: Layout, changed: Mapping[str, NewTensor], added: Mapping[str, NewTensor], dropped: Set[str] = frozenset()
) -> NewShard:
    """Return a replacement for a file, with changed tensors in place and added ones at the end."""
    new = {
        key: changed.get(key) or NewTensor(tensor.dtype, tensor.shape, source=tensor)
        for key, tensor in sorted(old.tensors.items(), key=lambda entry: (entry[1].begin, entry[1].end))
        if key not in dropped
    } | dict(added)
    kinds = {key: (tensor.dtype, tensor.shape) for key, tensor in old.tensors.items()}
    resized = {key for key, tensor in new.items() if (tensor.dtype, tensor.shape) != kinds.get(key)}
    placed: dict[str, StoredTensor] = {}
    end = 0
    for key, tensor in new.items():
        size = math.prod(tensor.shape) * FLOATS[tensor.dtype].itemsize if key in resized else old.tensors[key].nbytes
        placed[key] = StoredTensor(Path(old.file.name), end, end + size, key, tensor.dtype, tensor.shape)
        end += size
    in_order = {key: placed[key] for key in [*old.tensors, *added] if key in placed}
    head = _header(in_order, old.metadata)
    if not dropped and not resized:
        head = _first_bytes(old)  # byte for byte
    tensors = {key: replace(t, begin=t.begin + len(head), end=t.end + len(head)) for key, t in in_order.items()}
    parts = [_part(tensors[key], tensor) for key, tensor in new.items()]
    edited = [part for part in parts if part.edit is not None]
    copied = copies(part for part in parts if part.edit is None)
    return NewShard(old, tensors, NewFile(old.file.name, sorted([*edited, *copied], key=lambda part: part.begin), head))


def _part(place: StoredTensor, tensor: NewTensor) -> Part:
    if tensor.edit is None:
        return Part(place.begin, place.nbytes, tensor.source)
    return Part(place.begin, place.nbytes, tensor.source, tensor.edit, FLOATS[place.dtype], place.columns)


def _first_bytes(layout: Layout) -> bytes:
    with layout.file.open("rb") as opened:
        return opened.read(layout.data)


def _header(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header with its length prefix; tensor offsets count from the header's end."""
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for key, tensor in tensors.items():
        fields[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [tensor.begin, tensor.end]}
    return header_bytes(fields)


def header_bytes(fields: Mapping[str, Any]) -> bytes:
    """Encode a header as safetensors does: its length, then its fields as JSON padded with spaces."""
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _LENGTH) * _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text
