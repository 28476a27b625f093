"""Attention with a cache as ONNX Runtime's fused operator, one a layer, or as plain operators where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult, Skip, contract
from gralora_fx.exporters.reports import CachedAttentionReport
from gralora_fx.exporters.rules.attention.pack_qkv import merge_heads, pack_qkv
from gralora_fx.exporters.rules.attention.rotary import RotaryTables
from gralora_fx.exporters.rules.builder import (
    MICROSOFT,
    Builder,
    fixed_dim,
    is_same_dim,
    replace_value,
    smallest_number,
    static_dim,
)
from gralora_fx.exporters.rules.onnx_pipeline import (
    FLOAT_MATRICES,
    FOLDED_TRANSPOSES,
    FUSED_CACHED_ATTENTION,
    OWN_WEIGHTS,
    ROTARY_NODES,
)
from gralora_fx.exporters.translation.names import layer_of
from gralora_fx.exporters.translation.operators import AttentionNode, MaskNode

_HEAD_MULTIPLE = 8  # GroupQueryAttention supports only multiples of it as head size
_Shared = dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]]  # values that layers with the same mask share


@contract(needs={FLOAT_MATRICES, FOLDED_TRANSPOSES, ROTARY_NODES}, leaves={FUSED_CACHED_ATTENTION}, ends={OWN_WEIGHTS})
@dataclass(frozen=True)
class FuseAttention:
    """Replace every attention operator and the concatenation of its cache by `GroupQueryAttention`.

    Before: `key = Concat(past_key, new_key); y = Attention(query, key, value, mask)`
    After:  `y, key, value = GroupQueryAttention(query, new_key, new_value, past_key, past_value, ..., bias)`

    One bias masks padding in all layers; causality and the window are left to the operator, for which padding counts as
    positions. A layer that the operator does not support is decomposed into plain operators.
    """

    tables: RotaryTables  # the tables of rotary embeddings in the graph
    # whether the model has a cache of keys and values; else it keeps states
    has_attention: bool = True

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Replace them, in place; decomposed layers are skipped, the summary is a `CachedAttentionReport`."""
        nodes = [node for node, _ in AttentionNode.all_in(model.graph)]
        if next(MaskNode.all_in(model.graph), None) is not None:
            from gralora_fx.exporters.rules.attention.decomposed_attention import decompose_masks

            decompose_masks(model.graph)
        if not nodes and not self.has_attention:
            return _result(0, ())
        if not nodes:
            own = Skip("every layer", "it computes attention itself, not through transformers' interface")
            return _result(0, (own,))
        plain = {node: why for node in nodes if (why := _unfit(node)) is not None}
        fitting = [node for node in nodes if node not in plain]
        _give_own_caches(model.graph, fitting)
        masks: dict[tuple[ir.Value, int], ir.Value] = {}
        for node in plain:
            from gralora_fx.exporters.rules.attention.decomposed_attention import decompose_attention

            decompose_attention(model.graph, node, masks)
        shared: _Shared = {}
        for node in fitting:
            _replace(model.graph, node, self.tables, shared)
        return _result(len(fitting), tuple(Skip(layer_of(node), why) for node, why in plain.items()))


def _result(fused: int, plain: tuple[Skip, ...]) -> PassResult[ir.Model]:
    return PassResult(fused, plain, summary=CachedAttentionReport.of(fused, plain))


def _give_own_caches(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Give each attention a concatenation of its own if layers share keys and values.

    Before: `key = Concat(past_key, new_key); y = Attention(q, key, ...); z = Attention(p, key, ...)`
    After:  the same with `key_2 = Concat(past_key, new_key)` for the second
    """
    seen: set[ir.Value] = set()
    for node in nodes:
        attention = AttentionNode.read(node)
        for name, cached in (("key", attention.key), ("value", attention.value)):
            if cached in seen:
                joined = cached.producer()
                assert joined is not None
                copy = ir.node("Concat", list(joined.inputs), attributes=joined.attributes)
                copy.outputs[0].shape, copy.outputs[0].type = cached.shape, cached.type
                graph.insert_before(node, copy)
                node.replace_input_with(AttentionNode.position(name), copy.outputs[0])
            else:
                seen.add(cached)


def _unfit(node: ir.Node) -> str | None:
    """Return why the operator does not support a layer, or None if it does."""
    attention = AttentionNode.read(node)
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    if static_dim(query, 1) is None and is_same_dim(query, key, 1):
        return "its number of heads is not fixed"
    if mask is None or mask.shape is None or len(mask.shape) != 2:
        return "its mask is more than padding and a window"
    for name, cached in (("keys", key), ("values", value)):
        producer = cached.producer()
        if producer is None or producer.op_type != "Concat" or len(producer.inputs) != 2:
            return f"its {name} are not the cached ones and the new ones"
        if producer.inputs[0] not in node.graph.inputs:  # type: ignore[union-attr]
            return f"its {name} come from no input"
    sizes = [None if v.shape is None else v.shape[3] for v in (query, key, value)]
    if len({str(size) for size in sizes}) != 1:
        return f"queries, keys and values differ in size: {sizes}"
    size = static_dim(query, 3)
    if size is not None and size % _HEAD_MULTIPLE:
        return f"its head size is {size}, and the operator supports multiples of {_HEAD_MULTIPLE}"
    return None


def _lengths_and_bias(
    build: Builder, new: ir.Value, mask: ir.Value, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Build `seqlens_k [batch]`, `total_sequence_length [1]` and the bias `[batch, 1, length, total]` from a mask.

    `new` `[batch, length, ...]` gives the number of new positions: the cache may be a larger buffer.
    """
    total = build("Cast", build("Shape", mask, start=1, end=2), to=ir.DataType.INT32)
    last = build("Sub", total, build.tensor([1], ir.DataType.INT32))
    lengths = build("Expand", last, build("Shape", mask, start=0, end=1))
    zero, hidden = build.tensor(0.0, dtype), build.tensor(smallest_number(dtype), dtype)
    row = build("Where", build("Cast", mask, to=ir.DataType.BOOL), zero, hidden)
    wide = build("Unsqueeze", row, [1, 2])  # [batch, 1, 1, total]
    ones, length = build.ints(1), build("Shape", new, start=1, end=2)
    bias = build("Expand", wide, build("Concat", ones, ones, length, ones, axis=0))
    return lengths, total, bias


def _replace(graph: ir.Graph, node: ir.Node, tables: RotaryTables, shared: _Shared) -> None:
    attention = AttentionNode.read(node)
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    assert mask is not None  # see `_unfit`
    key_cat, value_cat = key.producer(), value.producer()
    assert key_cat is not None
    assert value_cat is not None
    heads, key_heads, size = (fixed_dim(value, axis) for value, axis in ((query, 1), (key, 1), (query, 3)))
    build = Builder(graph)
    attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": key_heads}
    attributes["scale"] = attention.scale
    if attention.window:
        attributes["local_window_size"] = attention.window
    if attention.softcap:
        attributes["softcap"] = attention.softcap
    new_key, new_value = key_cat.inputs[1], value_cat.inputs[1]
    assert new_key is not None
    assert new_value is not None
    joint = pack_qkv(build, graph, query, new_key, new_value, tables)
    parts = [merge_heads(build, part, tables) for part in (query, new_key, new_value)] if joint is None else [joint]
    if mask not in shared:
        shared[mask] = _lengths_and_bias(build, parts[0], mask, query.dtype or ir.DataType.FLOAT)
    lengths, total, bias = shared[mask]
    inputs = [
        *parts,
        *[None] * (3 - len(parts)),
        key_cat.inputs[0],
        value_cat.inputs[0],
        lengths,
        total,
        None,
        None,
        None,
        bias,
        attention.sinks,
    ]
    fused = build.node("GroupQueryAttention", inputs, domain=MICROSOFT, num_outputs=3, **attributes)
    output = node.outputs[0]
    for usage in list(output.uses()):
        if _joins_heads(usage.node, heads * size):
            replace_value(fused.outputs[0], usage.node.outputs[0])
    if output.uses() or output.is_graph_output():
        replace_value(build("Reshape", fused.outputs[0], [0, 0, heads, size]), output)
    for new, old in ((fused.outputs[1], key), (fused.outputs[2], value)):
        replace_value(new, old)
    build.insert_before(node)
    graph.remove(node, safe=True)
    graph.remove([key_cat, value_cat], safe=True)


def _joins_heads(node: ir.Node, width: int) -> bool:
    """Return whether a node reshapes `[batch, length, heads, size]` to `[batch, length, heads * size]`."""
    shape = node.outputs[0].shape
    return node.op_type == "Reshape" and shape is not None and len(shape) == 3 and shape[2] == width
