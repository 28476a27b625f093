"""Reads ONNX Runtime's adapter format from memory: its own reader needs a path, and copies every tensor.

The format is a flatbuffer: tables whose fields are found by a table of offsets before them.

    Adapter    format_version, adapter_version, model_version: int32; parameters: [Parameter]
    Parameter  name: string; dims: [int64]; data_type: int32 (of ONNX); raw_data: [uint8]
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.compat.onnx_messages import TensorProto

Buffer = NDArray[np.uint8]
_INT, _UNSIGNED, _SHORT = struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<H")
_IDENTIFIER, _VERSION = b"TORT", 1
_DTYPES: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("<f4"),
    TensorProto.FLOAT16: np.dtype("<f2"),
    TensorProto.DOUBLE: np.dtype("<f8"),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.INT32: np.dtype("<i4"),
}


@dataclass(frozen=True, eq=False)
class AdapterContent:
    """The contents of an adapter file and of its record, read once."""

    path: Path  # where the file is, for messages
    file: Buffer  # its bytes
    record: bytes


class FormatError(ValueError):
    """Bytes are not an adapter in the known version of the format."""


def read_parameters(content: Buffer) -> dict[str, NDArray[np.generic]]:
    """Return the tensors of an adapter file, by name; they share its memory."""
    try:
        view = content.data
        if view[4:8] != _IDENTIFIER:
            raise FormatError("it does not begin as one")
        adapter = _Table(view, _offset(view, 0))
        if (version := adapter.integer(0)) != _VERSION:
            raise FormatError(f"it is of version {version}")
        return dict(_parameter(_Table(view, at)) for at in adapter.tables(3))
    except (struct.error, IndexError, KeyError, OverflowError, UnicodeDecodeError, ValueError) as error:
        raise FormatError(str(error) or type(error).__name__) from error


def _parameter(table: _Table) -> tuple[str, NDArray[np.generic]]:
    dtype = _DTYPES[table.integer(2)]
    start, count = table.vector(1, 8)
    shape = struct.unpack_from(f"<{count}q", table.content, start)
    begin, size = table.vector(3, 1)
    if any(axis < 0 for axis in shape) or math.prod(shape) * dtype.itemsize != size:
        raise FormatError(f"a tensor of shape {list(shape)} has {size} bytes")
    text, length = table.vector(0, 1)
    array = np.frombuffer(table.content, dtype, size // dtype.itemsize, begin).reshape(shape)
    return bytes(table.content[text : text + length]).decode(), array


class _Table:
    """A table of a flatbuffer.

    Attributes:
        content: The whole buffer.
    """

    def __init__(self, content: memoryview, at: int) -> None:
        self.content, self._at = content, at
        self._fields = at - _INT.unpack_from(content, at)[0]
        self._size = _SHORT.unpack_from(content, self._fields)[0]

    def _field(self, number: int) -> int:
        """Return the position of a field; 0 for a missing one."""
        place = 4 + 2 * number
        offset = _SHORT.unpack_from(self.content, self._fields + place)[0] if place < self._size else 0
        return self._at + offset if offset else 0

    def integer(self, number: int) -> int:
        """Return a number field; 0 for a missing one."""
        at = self._field(number)
        return int(_INT.unpack_from(self.content, at)[0]) if at else 0

    def vector(self, number: int, width: int) -> tuple[int, int]:
        """Return the start of a vector or text field and its number of items; 0 items for a missing one."""
        at = self._field(number)
        if not at:
            return 0, 0
        start = at + _offset(self.content, at)
        count = _offset(self.content, start)
        if start + 4 + count * width > len(self.content):
            raise FormatError("it is cut short")
        return start + 4, count

    def tables(self, number: int) -> Iterator[int]:
        """Yield the positions of a field's tables."""
        start, count = self.vector(number, 4)
        for place in range(start, start + 4 * count, 4):
            yield place + _offset(self.content, place)


def _offset(content: memoryview, at: int) -> int:
    return int(_UNSIGNED.unpack_from(content, at)[0])
