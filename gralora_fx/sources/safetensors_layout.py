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

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gralora_fx.errors import CheckpointError

_LENGTH = 8  # bytes at the beginning of a file: the length of its header
_METADATA = "__metadata__"
_BLOCK = 2**19  # values that are checked at a time
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}


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
        with safe_open(file, framework="pt"):  # which checks the header and the size of the file
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


def read_into(handle: int, values: Tensor, offset: int) -> None:
    """Fill a contiguous tensor with bytes of a file.

    Args:
        handle: Descriptor of the file.
        values: Tensor to fill.
        offset: Offset of its first byte.

    Raises:
        CheckpointError: The file has become shorter.
    """
    view = memoryview(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise CheckpointError("a safetensors file has become shorter while it is read; copy or save it again")
        view, offset = view[count:], offset + count


def read_tensor(handle: int, extent: Extent) -> Tensor:
    """The values of a float tensor, in memory of their own.

    Args:
        handle: Descriptor of the file.
        extent: Where the tensor lies; its dtype is one of `FLOATS`.

    Raises:
        CheckpointError: The file has become shorter.
    """
    values = torch.empty(extent.shape, dtype=FLOATS[extent.dtype])
    read_into(handle, values, extent.begin)
    return values


def all_finite(handle: int, extent: Extent) -> bool:
    """Whether all values of a float tensor are finite, which are read some at a time."""
    dtype = FLOATS[extent.dtype]
    part = torch.empty(min(extent.numel, _BLOCK), dtype=dtype)
    for first in range(0, extent.numel, _BLOCK):
        values = part[: min(_BLOCK, extent.numel - first)]
        read_into(handle, values, extent.begin + first * dtype.itemsize)
        if not extremes_are_finite(values):
            return False
    return True


def extremes_are_finite(values: Tensor) -> bool:
    """Whether all values are finite: the extremes are not where any value is not, and cost less than each."""
    return not values.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))


def element_rows(extent: Extent, most: int) -> Iterator[tuple[int, int]]:
    """Cut a matrix's rows into runs of about `most` values: the first row of each, and the one after its last."""
    rows, width = extent.shape[0], max(1, math.prod(extent.shape[1:]))
    step = max(1, most // width)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))
