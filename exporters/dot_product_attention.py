"""PyTorch's attention as plain ONNX operators that ONNX Runtime fuses, where no cache is read."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`Softmax(MatMul(scale * query, Transpose(key)) + mask) @ value`.

    torchlib's form of it transposes keys by shapes that are worked out at run time, scales queries and keys apart, and
    looks for NaN in the weights of every layer, which a mask of finite numbers does not make.

    Args:
        query: `[..., length, size]`.
        key: `[..., total, size]`.
        value: `[..., total, value size]`.
        attn_mask: What is seen, or what is added to the scores; `[..., length, total]`, or None.
        dropout_p: Zero in evaluation mode.
        is_causal: Whether a position sees none behind it.
        scale: What scores are multiplied by, or None for the root of the size.
        enable_gqa: Whether fewer heads of keys are repeated.
    """
    shape, dtype = key.shape, query.dtype
    size = None if shape is None else shape[-1]
    if dropout_p or is_causal or enable_gqa or not isinstance(size, int) or not size or dtype is None:
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rank = len(shape)
    factor = op.Constant(value=_number(size**-0.5 if scale is None else scale, dtype))
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, factor), turned)
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        smallest = float(ml_dtypes.finfo(dtype.numpy()).min)  # type: ignore[no-untyped-call]  # it knows bfloat16
        seen, hidden = (op.Constant(value=_number(number, dtype)) for number in (0.0, smallest))
        attn_mask = op.Where(attn_mask, seen, hidden)
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _number(value: float, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(value, dtype.numpy()), dtype=dtype)
