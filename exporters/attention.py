"""Attention with a cache as ONNX Runtime's fused operator, one a layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gralora_fx.errors import ExportError
from gralora_fx.exporters.conversion import DOMAIN
from gralora_fx.exporters.plain_attention import lower_attention, lower_masks
from gralora_fx.exporters.reports import AttentionReport

_MICROSOFT = "com.microsoft"


def fuse_attention(model: ir.Model) -> AttentionReport:
    """Replace every attention operator and the concatenation of its cache by `GroupQueryAttention`.

    Before: `key = Concat(past_key, new_key); y = Attention(query, key, value, mask)`
    After:  `y, key, value = GroupQueryAttention(query, new_key, new_value, past_key, past_value, ..., bias)`

    The bias that hides padding is made once, of the mask; causality and the window are the operator's own, since a
    row's padding counts as positions in it. A layer of a form that the operator does not take becomes plain operators.

    Args:
        model: A translated model; it is changed in place.

    Returns:
        How many were replaced, and which became plain operators and why.

    Raises:
        ExportError: The number of heads of a layer is not known. The model must be discarded.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "Attention"]
    lower_masks(model.graph, DOMAIN)
    if not nodes:
        return AttentionReport(0, {"every layer": "it computes attention itself, not by transformers' interface"})
    plain = {node: why for node in nodes if (why := _unfit(node)) is not None}
    fitting = [node for node in nodes if node not in plain]
    _give_own_caches(model.graph, fitting)
    masks: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in plain:
        lower_attention(model.graph, node, masks)
    shared: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node in fitting:
        mask = node.inputs[3]
        assert mask is not None
        if mask not in shared:
            shared[mask] = _lengths_and_bias(model.graph, node, mask)
        _replace(model.graph, node, *shared[mask])
    if fitting:
        model.graph.opset_imports[_MICROSOFT] = 1
    model.graph.opset_imports.pop(DOMAIN, None)
    return AttentionReport(len(fitting), {_layer(node): why for node, why in plain.items()})


def _give_own_caches(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Give each attention a concatenation of its own where layers share keys and values.

    Before: `key = Concat(past_key, new_key); y = Attention(q, key, ...); z = Attention(p, key, ...)`
    After:  the same with `key_2 = Concat(past_key, new_key)` for the second
    """
    seen: set[ir.Value] = set()
    for node in nodes:
        for index in (1, 2):
            cached = node.inputs[index]
            assert cached is not None
            if cached in seen:
                joined = cached.producer()
                assert joined is not None
                copy = ir.node("Concat", list(joined.inputs), attributes=joined.attributes)
                copy.outputs[0].shape, copy.outputs[0].type = cached.shape, cached.type
                graph.insert_before(node, copy)
                node.replace_input_with(index, copy.outputs[0])
            else:
                seen.add(cached)


def _unfit(node: ir.Node) -> str | None:
    """Why the operator does not take an attention, or None if it does."""
    query, key, value, mask = node.inputs[:4]
    if mask is None or mask.shape is None or len(mask.shape) != 2:
        return "its mask is more than padding and a window"
    for name, cached in (("keys", key), ("values", value)):
        producer = None if cached is None else cached.producer()
        if producer is None or producer.op_type != "Concat" or len(producer.inputs) != 2:
            return f"its {name} are not the cached ones and the new ones"
        if producer.inputs[0] not in node.graph.inputs:  # type: ignore[union-attr]
            return f"its {name} come from no input"
    sizes = [None if v is None or v.shape is None else v.shape[3] for v in (query, key, value)]
    if len({str(size) for size in sizes}) != 1:
        return f"queries, keys and values have sizes {sizes}, which differ"
    return None


def _lengths_and_bias(graph: ir.Graph, before: ir.Node, mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`seqlens_k [batch]`, `total_sequence_length []` and the bias `[batch, 1, length, total]` of a padding mask."""
    query = before.inputs[0]
    assert query is not None
    dtype = query.dtype or ir.DataType.FLOAT
    smallest = np.finfo(dtype.numpy()).min if dtype != ir.DataType.BFLOAT16 else np.finfo(np.float32).min
    made: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes=attributes or None)  # type: ignore[arg-type]
        made.append(node)
        return node.outputs[0]

    def constant(name: str, values: float | list[int], kind: ir.DataType) -> ir.Value:
        tensor = ir.tensor(values, dtype=kind, name=name)
        value = ir.Value(name=name, shape=ir.Shape(np.shape(values)), type=ir.TensorType(kind), const_value=tensor)
        graph.initializers[name] = value
        return value

    shape = op("Shape", mask)
    total = op("Cast", op("Gather", shape, constant("attention.one", 1, ir.DataType.INT64)), to=ir.DataType.INT32)
    batch = op("Slice", shape, *(constant(f"attention.axis_{n}", [n], ir.DataType.INT64) for n in (0, 1)))
    last = op("Sub", total, constant("attention.one_int32", 1, ir.DataType.INT32))
    lengths = op("Expand", op("Reshape", last, constant("attention.vector", [1], ir.DataType.INT64)), batch)
    hidden = op(
        "Where",
        op("Cast", mask, to=ir.DataType.BOOL),
        constant("attention.zero", 0.0, dtype),
        constant("attention.hidden", float(smallest), dtype),
    )
    wide = op("Unsqueeze", hidden, constant("attention.axes", [1, 2], ir.DataType.INT64))  # [batch, 1, 1, total]
    rows = op("Shape", query, start=2, end=3)
    one = constant("attention.ones", [1], ir.DataType.INT64)
    bias = op("Expand", wide, op("Concat", one, one, rows, one, axis=0))
    first = next(node for node in graph if node is before)
    graph.insert_before(first, made)
    return lengths, total, bias


def _replace(graph: ir.Graph, node: ir.Node, lengths: ir.Value, total: ir.Value, bias: ir.Value) -> None:
    query, key, value, _, sinks = (*node.inputs, None)[:5]
    assert query is not None
    assert key is not None
    assert value is not None
    key_cat, value_cat = key.producer(), value.producer()
    assert key_cat is not None
    assert value_cat is not None
    heads, key_heads = _axis(query, 1), _axis(key, 1)
    width = heads * _axis(query, 3)
    output = node.outputs[0]
    made: list[ir.Node] = []

    def flat(tensor: ir.Value | None) -> ir.Value:
        """`[batch, heads, length, size]` as `[batch, length, heads * size]`."""
        turned = ir.node("Transpose", [tensor], attributes={"perm": [0, 2, 1, 3]})
        shape = ir.node("Constant", [], attributes={"value_ints": [0, 0, -1]})
        result = ir.node("Reshape", [turned.outputs[0], shape.outputs[0]])
        made.extend((turned, shape, result))
        return result.outputs[0]

    attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": key_heads}
    attributes["scale"] = node.attributes["scale"].as_float()
    if window := node.attributes["window"].as_int():
        attributes["local_window_size"] = window
    if softcap := node.attributes["softcap"].as_float():
        attributes["softcap"] = softcap
    inputs = [
        flat(query),
        flat(key_cat.inputs[1]),
        flat(value_cat.inputs[1]),
        key_cat.inputs[0],
        value_cat.inputs[0],
        lengths,
        total,
        None,
        None,
        None,
        bias,
        sinks,
    ]
    while inputs[-1] is None:
        inputs.pop()
    fused = ir.node("GroupQueryAttention", inputs, attributes=attributes, domain=_MICROSOFT, num_outputs=3, version=1)
    shape = ir.node("Constant", [], attributes={"value_ints": [0, 0, heads, width // heads]})
    apart = ir.node("Reshape", [fused.outputs[0], shape.outputs[0]])
    made.extend((fused, shape, apart))
    for new, old in ((fused.outputs[1], key), (fused.outputs[2], value), (apart.outputs[0], output)):
        new.shape, new.type, new.name = old.shape, old.type, old.name
        _take_place(graph, old, new)
    graph.insert_before(node, made)
    graph.remove(node, safe=True)
    graph.remove([key_cat, value_cat], safe=True)


def _take_place(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads a value read another, the graph's outputs included."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _axis(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ExportError(f"axis {axis} of {value.name} is {size}, which attention needs as a number")
    return size


def _layer(node: ir.Node) -> str:
    """The module that an attention was traced in."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [name.strip(" '\"[]") for name in scopes.split(",")]
    return next((name for name in reversed(names[:-1]) if name), str(node.name))
