"""Attention and masks as plain operators, where ONNX Runtime's own do not support them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from gralora_fx.exporters.rules.builder import Builder, fixed_dim, is_same_dim, smallest_number
from gralora_fx.exporters.translation.operators import AttentionNode, MaskNode


def decompose_attention(graph: ir.Graph, node: ir.Node, masks: dict[tuple[ir.Value, int], ir.Value]) -> None:
    """Replace one attention operator by matmuls and a softmax; the cache stays a concatenation.

    Before: `y = Attention(query, key, value, mask, sinks)`
    After:  `y = Transpose(MatMul(Softmax(scale * MatMul(query, Transpose(key)) + mask), value))`

    Query heads that share a key head become an axis of their own, so that no key is copied. The number of heads must be
    fixed only then, and with sinks: Inkling 2's attention over blocks has a head for each token.
    """
    attention = AttentionNode.read(node)
    query, key, value, sinks = attention.query, attention.key, attention.value, attention.sinks
    shared, heads, key_heads = not is_same_dim(query, key, 1), 0, 0
    if shared or sinks is not None:
        heads, key_heads = fixed_dim(query, 1), fixed_dim(key, 1)
    size, value_size = fixed_dim(query, 3), fixed_dim(value, 3)
    dtype = query.dtype or ir.DataType.FLOAT
    build = Builder(graph)
    bias = _bias(graph, node, attention, masks)
    if shared:  # [batch, key heads, heads / key heads, length, size] and [batch, key heads, 1, total, size]
        query = build("Reshape", query, [0, key_heads, heads // key_heads, -1, size])
        key, value = (build("Unsqueeze", part, [2]) for part in (key, value))
        if bias is not None:
            per_head = bias.shape is not None and bias.shape[1] == heads
            length = build("Shape", bias, start=2)
            shape = build("Concat", [0, key_heads, heads // key_heads], length, axis=0) if per_head else None
            bias = build("Unsqueeze", bias, [2]) if shape is None else build("Reshape", bias, shape)
    transposed_key = build("Transpose", key, perm=[0, 1, 2, 4, 3] if shared else [0, 1, 3, 2])
    scores = build("MatMul", build("Mul", query, build.tensor(attention.scale, dtype)), transposed_key)
    if attention.softcap:
        bound = build.tensor(attention.softcap, dtype)
        scores = build("Mul", build("Tanh", build("Div", scores, bound)), bound)
    if bias is not None:
        scores = build("Add", scores, bias)
    if sinks is None:
        weights = build("Softmax", scores, axis=-1)
    else:
        column = build.ints(1, key_heads, heads // key_heads, 1, 1) if shared else build.ints(1, heads, 1, 1)
        rows = build("Concat", build("Shape", scores, end=-1), [1], axis=0)
        beside = build("Expand", build("Reshape", sinks, column), rows)
        weights = build("Softmax", build("Concat", scores, beside, axis=-1), axis=-1)
        weights = build("Slice", weights, [0], [-1], [-1])
    result = build("MatMul", weights, value)
    if shared:
        result = build("Reshape", result, [0, heads, -1, value_size])
    build.replace(node, build("Transpose", result, perm=[0, 2, 1, 3]))


def decompose_masks(graph: ir.Graph) -> int:
    """Decompose the mask operators that something other than attention reads.

    Before: `m = Mask(padding)`
    After:  `m = Where(columns <= rows and padding, 0, smallest)`
    """
    count = 0
    mask: Any  # its length is a value and its dtype a number, which the operator's fields do not say
    for node, mask in MaskNode.all_in(graph):
        build = Builder(graph)
        length = build("Reshape", mask.length, [1])
        build.replace(node, _causal(build, mask.padding, length, mask.window, ir.DataType(mask.dtype)))
        count += 1
    return count


def _bias(
    graph: ir.Graph, node: ir.Node, attention: AttentionNode, masks: dict[tuple[ir.Value, int], ir.Value]
) -> ir.Value | None:
    """Return the additive mask, created once for all layers with the same padding mask and window."""
    query, mask, window = attention.query, attention.mask, attention.window
    if mask is None or (mask.shape is not None and len(mask.shape) == 4):
        return mask
    if (mask, window) not in masks:
        build, dtype = Builder(graph), query.dtype or ir.DataType.FLOAT
        masks[mask, window] = _causal(build, mask, build("Shape", query, start=2, end=3), window, dtype)
        build.insert_before(node)
    return masks[mask, window]


def _causal(build: Builder, padding: ir.Value, length: ir.Value, window: int, dtype: ir.DataType) -> ir.Value:
    """Build the mask `[batch, 1, length, total]` from padding `[batch, total]` and the number of queries `[1]`."""
    total = build("Shape", padding, start=1, end=2)
    ends, zero, one = build("Squeeze", total), build("Constant", value_int=0), build("Constant", value_int=1)
    begin = build("Squeeze", build("Sub", total, length))
    rows = build("Unsqueeze", build("Range", begin, ends, one), [1])
    columns = build("Unsqueeze", build("Range", zero, ends, one), [0])
    seen = build("LessOrEqual", columns, rows)
    if window:
        seen = build("And", seen, build("Greater", columns, build("Sub", rows, build("Constant", value_int=window))))
    real = build("Unsqueeze", build("Cast", padding, to=ir.DataType.BOOL), [1, 2])
    seen = build("And", build("Unsqueeze", seen, [0, 1]), real)
    return build("Where", seen, build.tensor(0.0, dtype), build.tensor(smallest_number(dtype), dtype))
