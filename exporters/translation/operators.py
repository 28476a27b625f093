"""How operators are translated to ONNX: this project's own, and those of PyTorch that torchlib translates otherwise.

The project's are of the domain `gralora`, larger than PyTorch's operators and named as the runtime's; a later pass
replaces them by what ONNX Runtime has. They take what the operators of `gralora_fx.core.operators` take, tensors as
inputs and the rest as attributes, and are written and read here alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_histc
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from gralora_fx.base.compat.torch_onnx import current_builder
from gralora_fx.core.operators.attention import Attention, DotProductAttention, Mask
from gralora_fx.core.operators.call import Call
from gralora_fx.core.operators.layers import Reshape, RmsNorm, Rotary, Slice

DOMAIN = "gralora"


class DomainNode(Call[ir.Value]):
    """A node of the domain, read and written by the names of the operator's arguments.

    Attributes:
        op_type: The operator.
    """

    op_type: ClassVar[str]

    @classmethod
    def of(cls, node: object) -> Self | None:
        """What a node takes; None where it is another operator."""
        if not isinstance(node, ir.Node) or (node.domain, node.op_type) != (DOMAIN, cls.op_type):
            return None
        return cls.read(node)

    @classmethod
    def read(cls, node: ir.Node) -> Self:
        """What a node that is known to be the operator takes."""
        inputs = [*node.inputs, *[None] * (len(cls.tensors) - len(node.inputs))]  # trailing ones may be left out
        attributes = {name: node.attributes[name].value for name in cls.names() if name not in cls.tensors}
        return cls(**dict(zip(cls.tensors, inputs, strict=True)), **attributes)

    @classmethod
    def all_in(cls, graph: Iterable[ir.Node]) -> Iterator[tuple[ir.Node, Self]]:
        """Every node of the operator among some, with what it takes.

        The nodes are listed first, and each is read when its turn comes, so a pass may change the graph meanwhile.
        """
        for node in list(graph):
            taken = cls.of(node)
            if taken is not None:
                yield node, taken

    def node(self) -> ir.Node:
        """A new node, for a pass to insert."""
        values = {name: getattr(self, name) for name in self.names()}
        inputs = [values.pop(name) for name in self.tensors]
        return ir.node(self.op_type, inputs, values, domain=DOMAIN, version=1, num_outputs=self.results)


class AttentionNode(DomainNode, Attention[ir.Value]):
    """`Attention`: as `gralora::attention`."""

    op_type = "Attention"


class DotProductAttentionNode(DomainNode, DotProductAttention[ir.Value]):
    """`DotProductAttention`: as `gralora::dot_product_attention`; `is_causal` is 0 or 1."""

    op_type = "DotProductAttention"


class MaskNode(DomainNode, Mask[ir.Value]):
    """`Mask`: as `gralora::mask`; `length` is a tensor of no axes, `dtype` an `ir.DataType`."""

    op_type = "Mask"


class RmsNormNode(DomainNode, RmsNorm[ir.Value]):
    """`RMSNormalization`: as `gralora::rms_norm`."""

    op_type = "RMSNormalization"


class RotaryNode(DomainNode, Rotary[ir.Value]):
    """`RotaryEmbedding`: as `gralora::rotary`; `interleaved` is 0 or 1."""

    op_type = "RotaryEmbedding"


def translation_of(kind: type[DomainNode]) -> Callable[..., Any]:
    """Return the translation of an operator to its node of the domain; it takes the operator's arguments in order."""

    def translation(*values: Any) -> Any:
        arguments = dict(zip(kind.names(), values, strict=True))
        for name, value in arguments.items():
            if name in kind.tensors and isinstance(value, int):
                arguments[name] = _add("Constant", [], {"value_int": value})
            elif isinstance(value, bool):
                arguments[name] = int(value)
        node = kind(**arguments).node()
        return _append(node) if len(node.outputs) == 1 else (_append(node), *node.outputs[1:])

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in kind.names()]
    translation.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # torch.onnx reads it
    return translation


def _reshape(x: Any, shape: list[int]) -> Any:
    """ONNX `Reshape` to a constant shape, 0 for a size that stays as it is."""
    sizes = _add("Constant", [], {"value_ints": list(shape)})
    return _add("Reshape", [x, sizes], {})


def _slice(x: Any, axis: int, start: int, stop: int, step: int) -> Any:
    """ONNX `Slice` with constant limits."""
    limits = [_add("Constant", [], {"value_ints": [number]}) for number in (start, stop, axis, step)]
    return _add("Slice", [x, *limits], {})


def _add(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> ir.Value:
    """A new node of ONNX's own in the graph that is being translated; its output."""
    return _append(ir.node(op_type, inputs, attributes))


def _append(node: ir.Node) -> ir.Value:
    tracer: Any = current_builder()
    tracer.nodes.append(node)
    return node.outputs[0]


# each takes the arguments of the operator's schema; those of features are added to a translation that has them
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    Reshape.target: _reshape,
    Slice.target: _slice,
    **{kind.target: translation_of(kind) for kind in DomainNode.__subclasses__()},
}


_MODES = {"bilinear": "linear", "bicubic": "cubic"}


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

    torchlib's translation transposes keys by shapes computed at run time, scales queries and keys separately, and
    checks every layer's weights for NaN, which cannot occur with a finite mask.

    Args:
        query: `[..., length, size]`.
        key: `[..., total, size]`.
        value: `[..., total, value size]`.
        attn_mask: A boolean or an additive mask, `[..., length, total]`, or None.
        dropout_p: Zero in evaluation mode.
        is_causal: Whether a position attends to no later one.
        scale: Factor of the scores, or None for `size ** -0.5`.
        enable_gqa: Whether fewer key heads are repeated.
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
    """`BatchNormalization` by the running statistics, which ONNX Runtime folds into a convolution before it.

    A layer without running statistics normalises by those of the batch, in evaluation too.

    Args:
        x: `[batch, channels, ...]`.
        weight: `[channels]` or None.
        bias: `[channels]` or None.
        running_mean: `[channels]`, or None without running statistics.
        running_var: As `running_mean`.
        training: Whether to normalise by the statistics of the batch.
        momentum: Of the running statistics; no effect here.
        eps: Added to the variance.
        cudnn_enabled: No effect here.
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
    """`Softplus`; torchlib's translation gives large numbers back as they are, which they are anyway."""
    if beta == 1.0:
        return op.Softplus(x)
    factor = op.Constant(value=_number(beta, x.dtype))
    return op.Div(op.Softplus(op.Mul(x, factor)), factor)


def fft_fftn(x: Any, s: Any = None, dim: Any = None, norm: str | None = None) -> Any:
    """Fourier transform of real numbers along given axes, as a complex tensor: its last axis is the pair of parts.

    PyTorch's decomposition fixes the sizes of the trace.
    """
    if s is not None or dim is None or norm not in (None, "backward"):
        raise NotImplementedError("fft_fftn with lengths, without axes, or with a factor has no translation")
    rank = len(x.shape)
    result = op.Unsqueeze(x, op.Constant(value_ints=[-1]))
    for axis in reversed([axis % rank for axis in dim]):
        result = op.DFT(result, None, op.Constant(value_int=axis))
    return result


def histc(x: Any, bins: int = 100, min: float = 0.0, max: float = 0.0) -> Any:
    """How many numbers lie in each of `bins` equal parts of `[min, max]`, such as the tokens of each route.

    torchlib's translation looks for NaN first. Here a number that lies in no part, as NaN does, equals no part's index.
    """
    if min == max or x.dtype is None:
        return aten_histc(x, bins, min, max)
    flat = op.Reshape(x, op.Constant(value_ints=[-1, 1]))
    low, high, count, last = (op.Constant(value=_number(value, x.dtype)) for value in (min, max, bins, bins - 1))
    part = op.Floor(op.Mul(op.Div(op.Sub(flat, low), op.Sub(high, low)), count))
    part = op.Where(op.Equal(flat, high), last, part)
    parts = op.Constant(value=ir.tensor(np.arange(bins, dtype=x.dtype.numpy()), dtype=x.dtype))
    return op.ReduceSum(op.Cast(op.Equal(part, parts), to=x.dtype), op.Constant(value_ints=[0]), keepdims=0)


def update_forms(model: ir.Model) -> None:
    """Rewrite nodes whose form changed in opset 20, in place.

    Before: `DFT(x, length, axis=1)`, `GridSample(x, grid, mode="bilinear")`
    After:  `DFT(x, length, 1)`, `GridSample(x, grid, mode="linear")`
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "DFT" and "axis" in node.attributes:
            _axis_as_input(node)
        elif node.domain == "" and node.op_type == "GridSample" and "mode" in node.attributes:
            mode = node.attributes["mode"].as_string()
            if mode in _MODES:
                node.attributes["mode"] = ir.AttrString("mode", _MODES[mode])


def _axis_as_input(node: ir.Node) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    axis = ir.node("Constant", [], {"value_int": node.attributes["axis"].as_int()})
    graph.insert_before(node, axis)
    node.resize_inputs(3)
    node.replace_input_with(2, axis.outputs[0])
    del node.attributes["axis"]
