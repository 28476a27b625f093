"""Queries, keys and values as fused attention takes them: heads merged, and all three packed in one matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from gralora_fx.exporters.rules.attention.rotary import RotaryTables, rotated
from gralora_fx.exporters.rules.builder import (
    MICROSOFT,
    Builder,
    add_initializer,
    attributes_of,
    const_ints,
    mark_concat,
    static_dim,
)
from gralora_fx.exporters.translation.operators import RmsNormNode, RotaryNode
from gralora_fx.exporters.translation.weights import concat_tensor, derived

SWAP = [0, 2, 1, 3]  # heads and length


def merge_heads(build: Builder, tensor: ir.Value, tables: RotaryTables) -> ir.Value:
    """Merge heads: `[batch, heads, length, size]` to `[batch, length, heads * size]`."""
    rotary = RotaryNode.of(tensor.producer())
    if rotary is not None:
        return rotated(build, rotary, merge_heads(build, rotary.x, tables), tables)
    swapped = _unswapped(build, tensor)
    if swapped is None:
        swapped = build("Transpose", tensor, perm=SWAP)
    return _before_split(swapped, tensor) or build("Reshape", swapped, [0, 0, -1])


def merged_heads(tensor: ir.Value) -> ir.Value | None:
    """Return the `[batch, length, heads * size]` whose heads were split to `[batch, heads, length, size]`, or None."""
    swapped = _before_swap(tensor)
    return None if swapped is None else _before_split(swapped, tensor)


def _unswapped(build: Builder, tensor: ir.Value | None) -> ir.Value | None:
    """Return the tensor `[batch, length, heads, size]` of a transpose, with last-axis operators redone, or None."""
    swapped = _before_swap(tensor)
    node = None if tensor is None else tensor.producer()
    if swapped is not None or node is None or tensor is None or tensor.shape is None:
        return swapped
    if RmsNormNode.of(node) is None and not _slices_last_axis(node):
        return None
    before = _unswapped(build, node.inputs[0])
    if before is None:
        return None
    result = build.node(node.op_type, [before, *node.inputs[1:]], domain=node.domain, **attributes_of(node)).outputs[0]
    result.shape, result.type = ir.Shape([tensor.shape[axis] for axis in SWAP]), tensor.type
    return result


def _slices_last_axis(node: ir.Node) -> bool:
    return node.op_type == "Slice" and len(node.inputs) > 3 and const_ints(node.inputs[3]) in ([3], [-1])


def pack_qkv(
    build: Builder, graph: ir.Graph, query: ir.Value, key: ir.Value, value: ir.Value, tables: RotaryTables
) -> ir.Value | None:
    """Pack queries, keys and values in one matmul, if all three are projections of one tensor.

    Before: `q = rotary(x @ Wq + bq); k = rotary(x @ Wk + bk); v = x @ Wv + bv`, each `[batch, heads, length, size]`
    After:  `rotary(x @ [Wq Wk Wv] + [bq bk bv])`, `[batch, length, (heads + 2 * key heads) * size]`, values rotated by
            an angle of zero, which keeps them bit for bit
    """
    of_query, of_key = RotaryNode.of(query.producer()), RotaryNode.of(key.producer())
    if of_query is None or of_key is None:
        return _joint(build, graph, [query, key, value]) if of_query is of_key else None
    result = _joint(build, graph, [of_query.x, of_key.x, value]) if _alike(of_query, of_key) else None
    if result is None:
        return None
    heads, key_heads, size = (static_dim(v, axis) or 0 for v, axis in ((query, 1), (key, 1), (query, 3)))
    cos, sin = of_query.cos, of_query.sin
    count = heads + 2 * key_heads
    half = static_dim(cos, 2) or 0
    partial = {} if 2 * half == size else {"num_heads": 1, "rotary_embedding_dim": 2 * half}
    apart = build("Reshape", result, [-1, count, size])  # each position as a row of the batch
    apart = build(
        "RotaryEmbedding",
        apart,
        tables.rows_of_heads(cos, heads + key_heads, key_heads),
        tables.table_after_rest(cos, 1.0, count),
        tables.table_after_rest(sin, 0.0, count),
        domain=MICROSOFT,
        interleaved=of_query.interleaved,
        **partial,
    )
    flattened = build("Reshape", apart, tables.flat_shape(cos, count * size))
    flattened.type = query.type
    if query.shape is not None:  # the runtime reads the number of heads off the width, which it does not work out here
        flattened.shape = ir.Shape([query.shape[0], query.shape[2], count * size])
    return flattened


def _joint(build: Builder, graph: ir.Graph, parts: Sequence[ir.Value]) -> ir.Value | None:
    """Return the tensor of which others are the consecutive slices, or one matmul that computes them side by side."""
    return _cut_from_one(parts) or _product(build, graph, parts)


def _product(build: Builder, graph: ir.Graph, parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """Build one matmul with the concatenated weights of several projections of one tensor."""
    matches = [_projection(part) for part in parts]
    projections = [projection for projection in matches if projection is not None]
    if len(projections) < len(parts):
        return None
    first = projections[0]
    if any(p.x is not first.x or (p.bias is None) != (first.bias is None) for p in projections):
        return None
    result = build("MatMul", first.x, concat_initializers(graph, [projection.weight for projection in projections]))
    if first.bias is not None:
        result = build("Add", result, concat_initializers(graph, [p.bias for p in projections if p.bias is not None]))
    outputs = [projection.output for projection in projections]
    mark_concat(result, outputs)
    widths = [static_dim(output, -1) for output in outputs]
    if first.output.shape is not None:
        result.shape = ir.Shape([*first.output.shape[:-1], sum(width or 0 for width in widths)])
    result.type = first.output.type
    return result


def _cut_from_one(parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """Return the tensor that consecutive slices cover, or None."""
    source, position = None, 0
    for part in parts:
        swapped = _before_swap(part)
        value = None if swapped is None or part is None else _before_split(swapped, part)
        node = None if value is None else value.producer()
        if node is None or node.op_type != "Slice" or node.inputs[0] is None:
            return None
        limits = [const_ints(limit) for limit in node.inputs[1:]]
        width = static_dim(node.inputs[0], -1)
        if len(limits) != 4 or width is None or limits[2:] != [[2], [1]] or limits[0] != [position]:
            return None
        if source is not None and node.inputs[0] is not source:
            return None
        source, position = node.inputs[0], min(limits[1][0], width)  # type: ignore[index]
    return source if position == static_dim(source, -1) else None


class _Projection(NamedTuple):
    """A matmul with a weight that nothing else reads."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value


def _projection(tensor: ir.Value | None) -> _Projection | None:
    """Return the projection from which heads were split, if it has no other reader."""
    swapped = _before_swap(tensor)
    value = None if swapped is None or tensor is None else _before_split(swapped, tensor)
    producer = None if value is None else value.producer()
    bias = None
    if producer is not None and producer.op_type == "Add":
        bias = next((v for v in producer.inputs if v is not None and v.is_initializer()), None)
        product = next((v for v in producer.inputs if v is not bias), None)
        if bias is None or product is None or len(product.uses()) != 1:
            return None
        producer = product.producer()
    if producer is None or producer.op_type != "MatMul":
        return None
    x, weight = producer.inputs
    if x is None or weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
        return None
    assert value is not None
    return _Projection(x, weight, bias, value)


def _alike(first: RotaryNode, second: RotaryNode) -> bool:
    """Return whether two rotary operators use the same angles."""
    return (first.cos, first.sin, first.interleaved) == (second.cos, second.sin, second.interleaved)


def _before_swap(tensor: ir.Value | None) -> ir.Value | None:
    """Return the tensor `[batch, length, heads, size]` whose transpose is given, or None."""
    producer = None if tensor is None else tensor.producer()
    swaps = producer is not None and producer.op_type == "Transpose"
    return producer.inputs[0] if swaps and list(producer.attributes["perm"].as_ints()) == SWAP else None  # type: ignore[union-attr]


def _before_split(swapped: ir.Value, tensor: ir.Value) -> ir.Value | None:
    """Return the `[batch, length, heads * size]` that was reshaped to `[batch, length, heads, size]`, or None."""
    producer = swapped.producer()
    before = None if producer is None or producer.op_type != "Reshape" else producer.inputs[0]
    heads, size = static_dim(tensor, 1), static_dim(tensor, 3)
    if before is None or before.shape is None or heads is None or size is None:
        return None
    return before if len(before.shape) == 3 and before.shape[2] == heads * size else None


def concat_initializers(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """Concatenate initializers along their last axis, lazily; graphs over the same tensors share the result."""
    name = _joint_name([str(value.name) for value in values])
    parts = [value.const_value for value in values if value.const_value is not None]
    return add_initializer(graph, derived(parts, ("concat", name), lambda: concat_tensor(name, parts)))


def _joint_name(names: Sequence[str]) -> str:
    """Name a concatenation: `attn.q_proj.weight` and `attn.k_proj.weight` give `attn.q_proj+k_proj.weight`."""
    parts = [name.split(".") for name in names]
    columns = list(zip(*parts, strict=False))
    if len({len(part) for part in parts}) > 1:
        return "+".join(names)
    return ".".join(column[0] if len(set(column)) == 1 else "+".join(column) for column in columns)
