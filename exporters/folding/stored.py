"""Bytes of initializers: where they lie in data files, and rows of them as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.errors import ExportError


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The stored tensor of an initializer."""
    assert value.const_value is not None
    return value.const_value


def rows_and_columns(value: ir.Value) -> tuple[int, int]:
    """Shape of an initializer as rows of bytes that follow each other: `[first axis, others]`; a vector is one row."""
    sizes = [int(size) for size in tensor_of(value).shape.numpy()]
    rows = sizes[0] if len(sizes) > 1 else 1
    columns = 1
    for size in sizes[1:] if len(sizes) > 1 else sizes:
        columns *= size
    return rows, columns


def dtype_of(value: ir.Value) -> np.dtype[Any]:
    """Dtype of an initializer."""
    return tensor_of(value).dtype.numpy()


def read_rows(value: ir.Value, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Rows of an initializer, `[rows, columns]` as of `rows_and_columns`, in memory of their own.

    Args:
        value: The initializer.
        start: The first row.
        stop: End of the rows; None for all.
    """
    count, columns = rows_and_columns(value)
    stop = count if stop is None else stop
    tensor, dtype = tensor_of(value), dtype_of(value)
    if not isinstance(tensor, ir.ExternalTensor):
        rows: NDArray[Any] = np.frombuffer(bytearray(tensor.tobytes()), dtype)
        return rows.reshape(count, columns)[start:stop]
    width = columns * dtype.itemsize
    with open(tensor.path, "rb") as file:
        file.seek((tensor.offset or 0) + start * width)
        content = bytearray(file.read((stop - start) * width))
    return np.frombuffer(content, dtype).reshape(stop - start, columns)


def inline_tensor(value: ir.Value, rows: NDArray[Any]) -> ir.TensorProtocol:
    """A tensor of an initializer's name, shape and dtype with other values, to be stored in the ONNX file itself."""
    old = tensor_of(value)
    proto = onnx.TensorProto(name=value.name, dims=old.shape.numpy(), data_type=int(old.dtype))
    proto.raw_data = rows.tobytes()
    return ir.TensorProtoTensor(proto)


def check_ranges(file: Path, model: ir.Model) -> None:
    """Check that every external initializer lies within its data file.

    Args:
        file: The ONNX file.
        model: Its model.

    Raises:
        ExportError: One does not; the data file is truncated or of another model.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            end, size = (tensor.offset or 0) + tensor.nbytes, Path(tensor.path).stat().st_size
            if end > size or (tensor.length not in (None, tensor.nbytes)):
                raise ExportError(
                    f"{tensor.path} has {size:,} bytes, but {value.name} of {file.name} takes bytes "
                    f"{tensor.offset or 0:,} to {end:,} of it; it is damaged, so copy or export it again"
                )
