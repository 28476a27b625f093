"""PyTorch operators that torchlib translates differently or not at all; loaded for graphs that call one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_histc
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from gralora_fx.exporters.translation import recurrent_layers


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
    """Translate to `Softmax(MatMul(scale * query, Transpose(key)) + mask) @ value`.

    torchlib's translation transposes keys by shapes computed at run time, scales queries and keys separately, and
    checks every layer's weights for NaN, which cannot occur with a finite mask. Queries are `[..., length, size]`, keys
    and values `[..., total, size]`, the boolean or additive mask `[..., length, total]`.
    """
    shape, dtype = key.shape, query.dtype
    size = None if shape is None else shape[-1]
    if dropout_p or is_causal or enable_gqa or not isinstance(size, int) or not size or dtype is None:
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rank = len(shape)
    factor = op.Constant(value=_number(size**-0.5 if scale is None else scale, dtype))
    transposed_key = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, factor), transposed_key)
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        smallest = float(ml_dtypes.finfo(dtype.numpy()).min)  # type: ignore[no-untyped-call]  # it knows bfloat16
        seen, hidden = (op.Constant(value=_number(number, dtype)) for number in (0.0, smallest))
        attn_mask = op.Where(attn_mask, seen, hidden)
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _number(value: float, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(value, dtype.numpy()), dtype=dtype)


def batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    """Translate to `BatchNormalization` with running statistics, which ONNX Runtime folds into a convolution.

    A layer without running statistics normalises by those of the batch, in evaluation too. `x` is `[batch, channels,
    ...]`, the other tensors `[channels]` or None.
    """
    if not training and running_mean is not None:
        shape = op.Shape(running_mean)
        if weight is None:
            weight = op.Expand(op.Constant(value=_number(1.0, running_mean.dtype)), shape)
        if bias is None:
            bias = op.Expand(op.Constant(value=_number(0.0, running_mean.dtype)), shape)
        return op.BatchNormalization(x, weight, bias, running_mean, running_var, epsilon=eps)
    rank = len(x.shape)
    axes = op.Constant(value_ints=[0, *range(2, rank)])
    column = op.Constant(value_ints=[1, -1, *[1] * (rank - 2)])
    centred = op.Sub(x, op.ReduceMean(x, axes))
    variance = op.ReduceMean(op.Mul(centred, centred), axes)
    result = op.Div(centred, op.Sqrt(op.Add(variance, op.Constant(value=_number(eps, x.dtype)))))
    result = result if weight is None else op.Mul(result, op.Reshape(weight, column))
    return result if bias is None else op.Add(result, op.Reshape(bias, column))


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """Translate to `Softplus`; torchlib's threshold for large numbers is not needed."""
    if beta == 1.0:
        return op.Softplus(x)
    factor = op.Constant(value=_number(beta, x.dtype))
    return op.Div(op.Softplus(op.Mul(x, factor)), factor)


def fft_fftn(x: Any, s: Any = None, dim: Any = None, norm: str | None = None) -> Any:
    """Translate a Fourier transform of real numbers along axes; PyTorch's decomposition would fix sizes."""
    if s is not None or dim is None or norm not in (None, "backward"):
        raise NotImplementedError("fft_fftn with lengths, without axes, or with a factor has no translation")
    rank = len(x.shape)
    result = op.Unsqueeze(x, op.Constant(value_ints=[-1]))
    for axis in reversed([axis % rank for axis in dim]):
        result = op.DFT(result, None, op.Constant(value_int=axis))
    return result


def histc(x: Any, bins: int = 100, min: float = 0.0, max: float = 0.0) -> Any:
    """Count the numbers in each of `bins` equal parts of `[min, max]`, such as the tokens of each route.

    torchlib's translation tests for NaN first. Here a number in no part, such as NaN, equals no part's index.
    """
    if min == max or x.dtype is None:
        return aten_histc(x, bins, min, max)
    flat = op.Reshape(x, op.Constant(value_ints=[-1, 1]))
    low, high, count, last = (op.Constant(value=_number(value, x.dtype)) for value in (min, max, bins, bins - 1))
    part = op.Floor(op.Mul(op.Div(op.Sub(flat, low), op.Sub(high, low)), count))
    part = op.Where(op.Equal(flat, high), last, part)
    parts = op.Constant(value=ir.tensor(np.arange(bins, dtype=x.dtype.numpy()), dtype=x.dtype))
    return op.ReduceSum(op.Cast(op.Equal(part, parts), to=x.dtype), op.Constant(value_ints=[0]), keepdims=0)


_aten = torch.ops.aten
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    **recurrent_layers.TRANSLATIONS,
    _aten.scaled_dot_product_attention.default: dot_product_attention,
    _aten.batch_norm.default: batch_norm,
    _aten.fft_fftn.default: fft_fftn,
    _aten.histc.default: histc,
    _aten.softplus.default: softplus,
}
