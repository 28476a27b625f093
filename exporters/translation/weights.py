"""Weights of a graph as ONNX tensors; lazy ones stay lazy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from gralora_fx.base.sources.lazy_tensors import value_entries, values_of

_WRITTEN_AT_ONCE = 2**24  # bytes
_DERIVED = "gralora_derived"  # key in a tensor's metadata

Made = TypeVar("Made")


def weight_tensor(name: str, tensor: Tensor) -> ir.TensorProtocol:
    """Return a parameter as an initializer's value, sharing its memory or computed when it is written."""
    if not tensor.is_meta:
        return TorchTensor(tensor.detach(), name=name)
    shape, dtype = ir.Shape(tensor.shape), from_torch_dtype(tensor.dtype)
    if tensor.ndim == 3:
        return StackedTensor(
            name, dtype, shape, lambda: (TorchTensor(each).numpy() for each in value_entries(tensor, name))
        )
    return LazyTensor(name, dtype, shape, lambda: TorchTensor(values_of(tensor, name).contiguous()))


def derived(sources: Sequence[ir.TensorProtocol], key: Hashable, make: Callable[[], Made]) -> Made:
    """Return a value derived from tensors, made once and shared by all graphs that hold them, so stored once."""
    memo: dict[Hashable, Made] = sources[0].meta.setdefault(_DERIVED, {})
    whole = key, *map(id, sources)  # the result holds all of them, so their ids stay valid
    if whole not in memo:
        memo[whole] = make()
    return memo[whole]


class LazyTensor(ir.LazyTensor):
    """A tensor whose values are computed at every read, and not kept."""

    def __init__(
        self,
        name: str | None,
        dtype: ir.DataType,
        shape: ir.Shape,
        make: Callable[[], ir.TensorProtocol],
        parts: Sequence[ir.TensorProtocol] = (),
    ) -> None:
        def values() -> ir.TensorProtocol:
            with torch.no_grad():
                return make()

        super().__init__(values, dtype=dtype, shape=shape, name=name)
        # the tensors that it concatenates along its last axis, for readers of one at a time; else empty
        self.parts = tuple(parts)

    def tofile(self, file: Any) -> None:
        """Write the values to a binary file; a transposed matrix is written by chunks of rows, without a copy."""
        tensor = self.raw()
        values = tensor.numpy()
        if isinstance(tensor, ir.Tensor) and (values.ndim < 2 or values.flags.c_contiguous):
            tensor.tofile(file)
            return
        step = max(1, _WRITTEN_AT_ONCE // max(1, values[:1].nbytes))
        for start in range(0, len(values), step):
            file.write(values[start : start + step].tobytes())


class StackedTensor(LazyTensor):
    """Matrices or vectors along a first axis, computed in order by `entries` and written one at a time."""

    def __init__(
        self, name: str | None, dtype: ir.DataType, shape: ir.Shape, entries: Callable[[], Iterator[NDArray[Any]]]
    ) -> None:
        super().__init__(name, dtype, shape, lambda: ir.tensor(np.stack(list(entries())), dtype=dtype))
        self.entries = entries

    def tofile(self, file: Any) -> None:
        """Write the values to a binary file, with at most one entry in memory."""
        with torch.no_grad():
            for entry in self.entries():
                file.write(np.ascontiguousarray(entry).view(np.uint8).data)
                del entry  # before the next is computed


def entries_of(tensor: ir.TensorProtocol) -> Iterator[NDArray[Any]]:
    """Return the entries of a tensor along its first axis, one at a time if they are computed so."""
    return tensor.entries() if isinstance(tensor, StackedTensor) else iter(tensor.numpy())


def concat_tensor(name: str, parts: Sequence[ir.TensorProtocol]) -> LazyTensor:
    """Concatenate tensors along their last axis lazily."""
    first, widths = parts[0], [int(part.shape.numpy()[-1]) for part in parts]
    shape = ir.Shape([*first.shape.numpy()[:-1], sum(widths)])

    def whole() -> ir.TensorProtocol:
        """Copy one part at a time, so that at most one is in memory beside the whole."""
        values = np.empty(shape.numpy(), first.dtype.numpy())
        for part, end, width in zip(parts, np.cumsum(widths), widths, strict=True):
            values[..., end - width : end] = part.numpy()
        return ir.tensor(values, dtype=first.dtype)

    return LazyTensor(name, first.dtype, shape, whole, parts)


def transposed_tensor(name: str | None, matrix: ir.TensorProtocol) -> LazyTensor:
    """Return the transpose of a matrix `[rows, columns]`, which is never copied as a whole."""
    shape = ir.Shape(list(reversed(matrix.shape.numpy())))
    return LazyTensor(name, matrix.dtype, shape, lambda: ir.tensor(matrix.numpy().T, dtype=matrix.dtype))


def parts_of(tensor: ir.TensorProtocol) -> tuple[ir.TensorProtocol, ...]:
    """Return the parts of a concatenated matrix, or the matrix itself."""
    return tensor.parts if isinstance(tensor, LazyTensor) and tensor.parts else (tensor,)


def unless_weight(node: ir.Node) -> bool | None:
    """Return whether constants may be folded at a node: not at a weight's transpose, which would be stored twice."""
    source = node.inputs[0] if node.op_type == "Transpose" and node.inputs else None
    return False if source is not None and source.is_initializer() else None
