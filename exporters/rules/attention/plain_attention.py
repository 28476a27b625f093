"""Attention without a cache as one operator a layer, of ONNX Runtime or of ONNX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from gralora_fx.exporters.rules.attention.decomposed_attention import decompose_attention
from gralora_fx.exporters.rules.attention.pack_qkv import SWAP, merged_heads
from gralora_fx.exporters.rules.builder import MICROSOFT, PADDING, Builder, replace_value, smallest_number, static_dim
from gralora_fx.exporters.translation.operators import AttentionNode, DotProductAttentionNode


@dataclass
class Masks:
    """Masks, each created once for all layers that share it."""

    graph: ir.Graph
    additive_masks: dict[tuple[ir.Value | None, ir.Value | None, str], ir.Value] = field(default_factory=dict)
    keys: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def of_keys(self, padding: ir.Value, node: ir.Node) -> ir.Value:
        """Return a padding mask `[batch, total]` as the runtime's operator takes it: integers, zero for padding."""
        if padding not in self.keys:
            build = Builder(self.graph)
            is_float = padding.dtype is not None and padding.dtype.is_floating_point()
            source = build("Cast", padding, to=ir.DataType.BOOL) if is_float else padding
            self.keys[padding] = build("Cast", source, to=ir.DataType.INT32)
            build.insert_before(node)
        return self.keys[padding]

    def additive(self, attention: DotProductAttentionNode, node: ir.Node) -> ir.Value | None:
        """Return the mask `[batch or 1, heads or 1, length, total]` that is added to an operator's scores."""
        mask, padding, query = attention.mask, attention.padding, attention.query
        if mask is None and padding is None:
            return None
        key = mask, padding, str(None if query.shape is None else query.shape[2])
        if key not in self.additive_masks:
            build = Builder(self.graph)
            dtype = query.dtype or ir.DataType.FLOAT
            bias = _bias(build, attention, dtype)
            if bias.shape is None:
                bias.shape, bias.type = ir.Shape([None, None, None, None]), ir.TensorType(dtype)
            self.additive_masks[key] = bias
            build.insert_before(node)
        return self.additive_masks[key]


def _bias(build: Builder, attention: DotProductAttentionNode, dtype: ir.DataType) -> ir.Value:
    mask, padding = attention.mask, attention.padding
    zero, hidden = build.tensor(0.0, dtype), build.tensor(smallest_number(dtype), dtype)
    keys = None
    if padding is not None:
        keys = build("Unsqueeze", build("Cast", padding, to=ir.DataType.BOOL), [1, 2])
    if mask is not None and mask.dtype != ir.DataType.BOOL:
        bias = mask if keys is None else build("Where", keys, mask, hidden)
    else:
        allowed = keys if mask is None else mask if keys is None else build("And", mask, keys)
        bias = build("Where", allowed, zero, hidden)
    rows = None if mask is None or mask.shape is None else mask.shape[len(mask.shape) - 2]
    if mask is not None and rows != 1 and rows is not None:
        return bias
    ones = build.ints(1)
    return build("Expand", bias, build("Concat", ones, ones, _length(build, attention.query), ones, axis=0))


def _length(build: Builder, query: ir.Value) -> ir.Value:
    """Return the number of queries, from a graph input if one has it, so that the query gets no more readers."""
    size = None if query.shape is None else query.shape[2]
    if isinstance(size, int):
        return build.ints(size)
    for value in build.graph.inputs:
        for axis, other in enumerate(value.shape or ()):
            if isinstance(other, ir.SymbolicDim) and other == size and other.value is not None:
                return build("Shape", value, start=axis, end=axis + 1)
    return build("Shape", query, start=2, end=3)


def replace_attention(graph: ir.Graph, node: ir.Node, attention: DotProductAttentionNode, masks: Masks) -> str | None:
    """Replace attention by one operator, or by plain ones if none supports it; return the reason then."""
    why = _unfit(attention)
    build = Builder(graph)
    if why is None:
        _replace(build, node, attention, masks)
        build.insert_before(node)
    else:
        _decompose(build, node, attention, masks.additive(attention, node))
    graph.remove(node, safe=True)
    return why


def _unfit(attention: DotProductAttentionNode) -> str | None:
    """Return why the operator does not support a layer, or None if it does."""
    if attention.query.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"it computes in {attention.query.dtype}, which the operator does not on a CPU"
    heads, key_heads = static_dim(attention.query, 1), static_dim(attention.key, 1)
    return "its number of heads is not known" if heads is None or key_heads is None else None


def _replace(build: Builder, node: ir.Node, attention: DotProductAttentionNode, masks: Masks) -> None:
    query, key, value = parts = attention.query, attention.key, attention.value
    heads, key_heads = static_dim(query, 1), static_dim(key, 1)
    merged = [None if part.is_graph_output() else merged_heads(part) for part in parts]
    output = node.outputs[0]
    are_apart = None in merged[1:]  # which ONNX Runtime's operator takes only if keys and values are as wide
    fits = merged[0] is not None and (not are_apart or static_dim(key, 3) == static_dim(value, 3))
    if heads == key_heads and not attention.is_causal and fits:
        of_keys = [key, value] if are_apart else merged[1:]
        keys = masks.of_keys(attention.padding, node) if attention.mask is None and attention.padding else None
        bias = None if keys is not None else masks.additive(attention, node)
        inputs = [merged[0], *of_keys, None, keys, bias]
        new = build.node("MultiHeadAttention", inputs, domain=MICROSOFT, num_heads=heads, scale=attention.scale)
    else:
        bias = masks.additive(attention, node)
        options: dict[str, Any] = {"scale": attention.scale, "is_causal": attention.is_causal}
        if None in merged:
            replace_value(build("Attention", *parts, bias, **options), output)
            return
        new = build.node("Attention", [*merged, bias], q_num_heads=heads, kv_num_heads=key_heads, **options)
    new.meta[PADDING] = attention.padding
    result, width = new.outputs[0], static_dim(value, 3)
    for end in _merging_reshapes(output):
        replace_value(result, end)
    if output.uses() or output.is_graph_output():
        if result.shape is None and query.shape is not None and heads and width:
            result.shape, result.type = ir.Shape([query.shape[0], query.shape[2], heads * width]), output.type
        apart = build("Reshape", result, [0, 0, heads, -1 if width is None else width])
        replace_value(build("Transpose", apart, perm=SWAP), output)


def _merging_reshapes(output: ir.Value) -> list[ir.Value]:
    """Return the values `[batch, length, heads * size]` that are reshaped from attention's output alone."""
    merged = []
    for usage in list(output.uses()):
        node = usage.node
        if node.op_type == "Reshape" and _same_shape(node.outputs[0], output):
            merged += _merging_reshapes(node.outputs[0])
        elif node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == SWAP:
            heads, size = static_dim(output, 1), static_dim(output, 3)
            for end in list(node.outputs[0].uses()):
                shape = end.node.outputs[0].shape
                joins = end.node.op_type == "Reshape" and shape is not None and len(shape) == 3
                if joins and shape is not None and heads and size and shape[2] == heads * size:
                    merged.append(end.node.outputs[0])
    return merged


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    return one.shape is not None and other.shape is not None and list(one.shape) == list(other.shape)


def _decompose(build: Builder, node: ir.Node, attention: DotProductAttentionNode, bias: ir.Value | None) -> None:
    """Replace an operator by matmuls and a softmax."""
    query, key = attention.query, attention.key
    if bias is None and attention.is_causal:
        bias = _causal(build, query, key)
    plain = AttentionNode(
        query, key, attention.value, bias, sinks=None, scale=attention.scale, window=0, softcap=0.0, dropout=0.0
    ).node()
    build.nodes.append(plain)
    result, output = plain.outputs[0], node.outputs[0]
    result.type = output.type
    replace_value(build("Transpose", result, perm=SWAP), output)
    build.insert_before(node)
    decompose_attention(build.graph, plain, {})


def _causal(build: Builder, query: ir.Value, key: ir.Value) -> ir.Value:
    """Build the additive mask `[1, 1, length, total]` that hides later positions."""
    dtype = query.dtype or ir.DataType.FLOAT
    start, step = build.scalar(0), build.scalar(1)
    sizes = [build("Squeeze", build("Shape", part, start=2, end=3)) for part in (query, key)]
    rows, columns = (build("Range", start, size, step) for size in sizes)
    seen = build("LessOrEqual", build("Unsqueeze", columns, [0]), build("Unsqueeze", rows, [1]))
    mask = build("Where", seen, build.tensor(0.0, dtype), build.tensor(smallest_number(dtype), dtype))
    return build("Unsqueeze", mask, [0, 1])
