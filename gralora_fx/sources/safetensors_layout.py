"""Where each tensor of a safetensors file lies, and its values read by themselves: nothing is mapped into memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gralora_fx.errors import CheckpointError

_LENGTH = 8  # bytes at the beginning of a file: the length of its header
_METADATA = "__metadata__"
_BLOCK = 2**19  # values that are checked at a time
FLOATS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_EXPONENTS = {FLOATS["F16"]: np.uint16(0x7C00), FLOATS["BF16"]: np.uint16(0x7F80)}  # all set: infinite or no number


@dataclass(frozen=True)
class Extent:
    """A tensor in a file.

    Attributes:
        dtype: safetensors' name of its dtype, such as `BF16`.
        shape: Its shape.
        begin: Offset of its first byte in the file.
        end: Offset of the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """A safetensors file.

    Attributes:
        file: The file.
        tensors: Its tensors by key, in the order of the file's header.
        metadata: Texts saved with them.
        data: Offset of the first tensor's first byte: the length of all that comes before.
    """

    file: Path
    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]
    data: int


def read_layout(file: Path) -> Layout:
    """The layout of a safetensors file, which is checked to be whole.

    Raises:
        CheckpointError: It cannot be read, is cut short, or is not a safetensors file.
    """
    try:
        with safe_open(file, framework="np"):  # which checks the header and the size of the file
            pass
        with file.open("rb") as opened:
            data = _LENGTH + int.from_bytes(opened.read(_LENGTH), "little")
            fields: dict[str, Any] = json.loads(opened.read(data - _LENGTH))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); it is truncated or not a safetensors file, so copy or save it again"
        ) from error
    metadata = fields.pop(_METADATA, None) or {}
    tensors = {
        key: Extent(entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"]))
        for key, entry in fields.items()
    }
    return Layout(file, tensors, metadata, data)


def header(tensors: Mapping[str, Extent], metadata: Mapping[str, str], data: int) -> bytes:
    """The bytes before the first tensor, its length included.

    Args:
        tensors: The tensors by key, in the order of the header.
        metadata: Texts saved with them.
        data: Offset that the extents count the first tensor at.
    """
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for key, extent in tensors.items():
        offsets = [extent.begin - data, extent.end - data]
        fields[key] = {"dtype": extent.dtype, "shape": list(extent.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _LENGTH) * _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text


@contextmanager
def opened_for_reading(file: Path) -> Iterator[int]:
    """A file's descriptor.

    Raises:
        CheckpointError: It cannot be opened.
    """
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); copy or save it again") from error
    try:
        yield handle
    finally:
        os.close(handle)


def bytes_of(values: NDArray[Any]) -> memoryview:
    """The bytes of an array whose values follow each other, for reading and writing; of bfloat16 too."""
    return memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # arrays are buffers


def read_into(handle: int, values: NDArray[Any], offset: int) -> None:
    """Fill a contiguous array with bytes of a file.

    Args:
        handle: Descriptor of the file.
        values: Array to fill.
        offset: Offset of its first byte.

    Raises:
        CheckpointError: The file has become shorter.
    """
    view = bytes_of(values)
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise CheckpointError("a safetensors file has become shorter while it is read; copy or save it again")
        view, offset = view[count:], offset + count


def read_tensor(handle: int, extent: Extent) -> NDArray[Any]:
    """The values of a float tensor, in memory of their own.

    Args:
        handle: Descriptor of the file.
        extent: Where the tensor lies; its dtype is one of `FLOATS`.

    Raises:
        CheckpointError: The file has become shorter.
    """
    values = np.empty(extent.shape, FLOATS[extent.dtype])
    read_into(handle, values, extent.begin)
    return values


def all_finite(handle: int, extent: Extent) -> bool:
    """Whether all values of a float tensor are finite, which are read some at a time."""
    dtype = FLOATS[extent.dtype]
    part = np.empty(min(extent.numel, _BLOCK), dtype)
    for first in range(0, extent.numel, _BLOCK):
        values = part[: min(_BLOCK, extent.numel - first)]
        read_into(handle, values, extent.begin + first * dtype.itemsize)
        if not extremes_are_finite(values):
            return False
    return True


def extremes_are_finite(values: NDArray[Any]) -> bool:
    """Whether all values are finite: the extremes are not where any value is not, and cost less than each."""
    if not values.size:
        return True
    if values.dtype.itemsize < 4:  # of half precision, whose extremes numpy finds slowly: by the bits of the exponent
        exponent = _EXPONENTS[values.dtype]
        return not bool(((values.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def element_rows(extent: Extent, most: int) -> Iterator[tuple[int, int]]:
    """Cut a matrix's rows into runs of about `most` values: the first row of each, and the one after its last."""
    rows, width = extent.shape[0], max(1, math.prod(extent.shape[1:]))
    step = max(1, most // width)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))
