"""Weights of a graph as tensors of an ONNX model; those that are made when they are read stay so."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from gralora_fx.deferred import values_of


def weight_tensor(name: str, tensor: Tensor) -> ir.TensorProtocol:
    """A parameter as an initializer's value, which shares its memory or is made when it is written.

    Args:
        name: Name of the initializer.
        tensor: The parameter; on the meta device it has a source (see `gralora_fx.deferred`).
    """
    if not tensor.is_meta:
        return TorchTensor(tensor.detach(), name=name)
    shape, dtype = ir.Shape(tensor.shape), from_torch_dtype(tensor.dtype)
    return made_when_written(name, dtype, shape, lambda: TorchTensor(values_of(tensor, name).contiguous()))


def made_when_written(
    name: str, dtype: ir.DataType, shape: ir.Shape, make: Callable[[], ir.TensorProtocol]
) -> ir.LazyTensor:
    """A tensor whose values a function makes whenever they are read, and which nothing keeps.

    Args:
        name: Name of the tensor.
        dtype: Dtype of the values.
        shape: Shape of the values.
        make: Makes the values.
    """

    def values() -> ir.TensorProtocol:
        with torch.no_grad():
            return make()

    return ir.LazyTensor(values, dtype=dtype, shape=shape, name=name)


def unless_weight(node: ir.Node) -> bool | None:
    """Whether constants may be folded at a node: not where a weight is transposed, which would be stored twice.

    Args:
        node: Any node.

    Returns:
        False for such a node, else None, which leaves it to the folding.
    """
    source = node.inputs[0] if node.op_type == "Transpose" and node.inputs else None
    return False if source is not None and source.is_initializer() else None
