"""Attention and its mask as plain ONNX operators, where the runtime's fused operator does not take a layer."""

from __future__ import annotations

import ml_dtypes
import onnx_ir as ir

from gralora_fx.errors import ExportError
from gralora_fx.exporters.onnx_passes.builder import Builder, known_size, take_place


def lower_attention(graph: ir.Graph, node: ir.Node, masks: dict[tuple[ir.Value, int], ir.Value]) -> None:
    """Replace one attention operator by matrix products and a softmax; the cache stays a concatenation beside it.

    Before: `y = Attention(query, key, value, mask, sinks)`
    After:  `y = Transpose(MatMul(Softmax(scale * MatMul(query, Transpose(key)) + mask), value))`

    Where key heads are fewer, the heads of a query that share one are an axis of their own, so that no key is copied.

    Args:
        graph: The graph of the node; it is changed in place.
        node: The operator: query `[batch, heads, length, size]`, key `[batch, key heads, total, size]`, value
            `[batch, key heads, total, value size]`, a padding mask `[batch, total]` or one that is added to the scores
            `[batch, 1 or heads, length, total]`, and sinks `[heads]` or none.
        masks: What was made of padding masks and windows so far; gains what this layer needs.

    Raises:
        ExportError: The number of heads is not known.
    """
    query, key, value, mask, sinks = (*node.inputs, None, None)[:5]
    assert query is not None
    assert key is not None
    assert value is not None
    heads, key_heads, size, value_size = _axis(query, 1), _axis(key, 1), _axis(query, 3), _axis(value, 3)
    window, softcap = node.attributes["window"].as_int(), node.attributes["softcap"].as_float()
    dtype = query.dtype or ir.DataType.FLOAT
    build = Builder(graph)
    bias = _bias(graph, node, masks, build, mask, window, dtype)
    shared = heads != key_heads
    if shared:  # [batch, key heads, heads / key heads, length, size] and [batch, key heads, 1, total, size]
        query = build("Reshape", query, build.ints(0, key_heads, heads // key_heads, -1, size))
        key, value = (build("Unsqueeze", part, build.ints(2)) for part in (key, value))
        if bias is not None:
            per_head = bias.shape is not None and bias.shape[1] == heads
            length = build("Shape", bias, start=2)
            shape = build("Concat", build.ints(0, key_heads, heads // key_heads), length, axis=0) if per_head else None
            bias = build("Unsqueeze", bias, build.ints(2)) if shape is None else build("Reshape", bias, shape)
    turned = build("Transpose", key, perm=[0, 1, 2, 4, 3] if shared else [0, 1, 3, 2])
    scale = node.attributes["scale"].as_float()
    scores = build("MatMul", build("Mul", query, build.tensor(scale, dtype)), turned)
    if softcap:
        bound = build.tensor(softcap, dtype)
        scores = build("Mul", build("Tanh", build("Div", scores, bound)), bound)
    if bias is not None:
        scores = build("Add", scores, bias)
    if sinks is None:
        weights = build("Softmax", scores, axis=-1)
    else:
        column = build.ints(1, key_heads, heads // key_heads, 1, 1) if shared else build.ints(1, heads, 1, 1)
        rows = build("Concat", build("Shape", scores, end=-1), build.ints(1), axis=0)
        beside = build("Expand", build("Reshape", sinks, column), rows)
        weights = build("Softmax", build("Concat", scores, beside, axis=-1), axis=-1)
        weights = build("Slice", weights, build.ints(0), build.ints(-1), build.ints(-1))
    result = build("MatMul", weights, value)
    if shared:
        result = build("Reshape", result, build.ints(0, heads, -1, value_size))
    _replace(node, build("Transpose", result, perm=[0, 2, 1, 3]), build)


def lower_masks(graph: ir.Graph, domain: str) -> int:
    """Replace every mask operator, whose result something else than attention reads.

    Before: `m = Mask(padding)`
    After:  `m = Where(columns <= rows and padding, 0, smallest)`

    Args:
        graph: A graph; it is changed in place.
        domain: The operator's domain.

    Returns:
        How many were replaced.
    """
    nodes = [node for node in graph if node.domain == domain and node.op_type == "Mask"]
    for node in nodes:
        build = Builder(graph)
        padding, length = node.inputs
        assert padding is not None
        assert length is not None
        window, dtype = node.attributes["window"].as_int(), ir.DataType(node.attributes["dtype"].as_int())
        rows = build("Reshape", length, build.ints(1))
        _replace(node, _causal(build, padding, rows, window, dtype), build)
    return len(nodes)


def _bias(
    graph: ir.Graph,
    node: ir.Node,
    masks: dict[tuple[ir.Value, int], ir.Value],
    build: Builder,
    mask: ir.Value | None,
    window: int,
    dtype: ir.DataType,
) -> ir.Value | None:
    """What is added to the scores, made once for all layers with one padding mask and window."""
    if mask is None or (mask.shape is not None and len(mask.shape) == 4):
        return mask
    if (mask, window) not in masks:
        query = node.inputs[0]
        assert query is not None
        apart = Builder(graph)
        masks[mask, window] = _causal(apart, mask, apart("Shape", query, start=2, end=3), window, dtype)
        apart.insert_before(node)
    return masks[mask, window]


def _causal(build: Builder, padding: ir.Value, length: ir.Value, window: int, dtype: ir.DataType) -> ir.Value:
    """`[batch, 1, length, total]` of a padding mask `[batch, total]` and the number of new positions `[1]`."""
    total = build("Shape", padding, start=1, end=2)
    ends, zero, one = build("Squeeze", total), build("Constant", value_int=0), build("Constant", value_int=1)
    begin = build("Squeeze", build("Sub", total, length))
    rows = build("Unsqueeze", build("Range", begin, ends, one), build.ints(1))
    columns = build("Unsqueeze", build("Range", zero, ends, one), build.ints(0))
    seen = build("LessOrEqual", columns, rows)
    if window:
        seen = build("And", seen, build("Greater", columns, build("Sub", rows, build("Constant", value_int=window))))
    real = build("Unsqueeze", build("Cast", padding, to=ir.DataType.BOOL), build.ints(1, 2))
    seen = build("And", build("Unsqueeze", seen, build.ints(0, 1)), real)
    smallest = ml_dtypes.finfo(dtype.numpy()).min  # type: ignore[no-untyped-call]  # it knows bfloat16
    return build("Where", seen, build.tensor(0.0, dtype), build.tensor(float(smallest), dtype))


def _replace(node: ir.Node, new: ir.Value, build: Builder) -> None:
    take_place(new, node.outputs[0])
    build.insert_before(node)
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)


def _axis(value: ir.Value, axis: int) -> int:
    size = known_size(value, axis)
    if size is None:
        raise ExportError(f"axis {axis} of {value.name} is {value.shape}, which attention needs as a number")
    return size
