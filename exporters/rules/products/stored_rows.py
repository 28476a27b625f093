"""The bytes of initializers: where they lie in data files, and their values by rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.base.sources.rewriting import StoredBytes


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """Return the stored tensor of an initializer."""
    assert value.const_value is not None
    return value.const_value


def external_tensors(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """Yield the tensors in data files, branches included, with the names of their initializers."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield str(value.name), value.const_value


def stored_bytes(tensor: ir.ExternalTensor) -> StoredBytes:
    """Return where a tensor lies in its data file."""
    begin = tensor.offset or 0
    return StoredBytes(Path(tensor.path), begin, begin + tensor.nbytes)


def rows_and_columns(value: ir.Value) -> tuple[int, int]:
    """Return an initializer's shape as rows of contiguous bytes, `[first axis, others]`; a vector is one row."""
    sizes = [int(size) for size in tensor_of(value).shape.numpy()]
    return (sizes[0], math.prod(sizes[1:])) if len(sizes) > 1 else (1, math.prod(sizes))


def dtype_of(value: ir.Value) -> np.dtype[Any]:
    """Return the NumPy dtype of an initializer."""
    return tensor_of(value).dtype.numpy()


def read_rows(value: ir.Value, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Read rows of an initializer into new memory, `[rows, columns]` as by `rows_and_columns`."""
    count, columns = rows_and_columns(value)
    stop = count if stop is None else stop
    tensor, dtype = tensor_of(value), dtype_of(value)
    if not isinstance(tensor, ir.ExternalTensor):
        rows: NDArray[Any] = np.frombuffer(bytearray(tensor.tobytes()), dtype)
        return rows.reshape(count, columns)[start:stop]
    values = np.empty((stop - start, columns), dtype)
    stored_bytes(tensor).read_into(values, start * columns * dtype.itemsize)
    return values
