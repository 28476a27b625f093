"""Cross-attention keys and values, computed in a decoder's first step and cached for the later ones."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import add_initializer
from gralora_fx.graph.pipeline import PassResult
from gralora_fx.runtime.export_directory import FLAG

_EVERYTHING = 2**63 - 1


def cache_cross_attention(model: ir.Model) -> PassResult[ir.Model]:
    """Take the cross-attention keys and values from the past, once there are any.

    Before: `present.N.encoder.key = Transpose(Reshape(MatMul(encoder_hidden_states, w)))`
    After:  `present.N.encoder.key = If(use_cache_branch)`, one branch of which is `past_key_values.N.encoder.key`, the
        other the computation from before; the decoder's own past is cut to nothing where the flag is false

    Args:
        model: A decoder whose inputs and outputs are named; it is changed in place.
    """
    graph = model.graph
    flag = _input(FLAG, ir.DataType.BOOL, [1])
    outputs = {str(value.name): value for value in graph.outputs}
    layers = sum(name.endswith(".encoder.key") for name in outputs)
    decoder_pasts = {str(value.name): value for value in graph.inputs if str(value.name).startswith("past_key_values.")}
    _read_past_if(graph, flag, decoder_pasts.values())
    others = [value for value in graph.inputs if value not in decoder_pasts.values()]
    pasts: list[ir.Value] = []
    for index in range(layers):
        names = [f"{index}.encoder.{kind}" for kind in ("key", "value")]
        pair = [outputs[f"present.{name}"] for name in names]
        cached = [_past_like(value, f"past_key_values.{name}") for name, value in zip(names, pair, strict=True)]
        _choose(graph, flag, cached, pair)
        pasts += [decoder_pasts[f"past_key_values.{index}.decoder.{kind}"] for kind in ("key", "value")] + cached
    graph.inputs[:] = [*others, *pasts, flag]
    graph.sort()
    return PassResult(2 * layers)


def _read_past_if(graph: ir.Graph, flag: ir.Value, pasts: Iterable[ir.Value]) -> None:
    """Slice past keys and values to length 0 if the flag is false, whatever was passed for them."""
    numbers = [_constant(graph, f"past.{number}", number) for number in (0, 2, _EVERYTHING)]
    nothing, axis, everything = numbers
    end = ir.node("Where", [flag, everything, nothing])
    nodes = [end]
    for past in pasts:
        slice_node = ir.node("Slice", [past, nothing, end.outputs[0], axis])
        value = slice_node.outputs[0]
        value.shape, value.type, value.name = past.shape, past.type, f"{past.name}.read"
        ir.convenience.replace_all_uses_with(past, value)
        slice_node.replace_input_with(0, past)
        assert past.shape is not None
        past.shape = ir.Shape([*past.shape[:2], "past_decoder_sequence_length", past.shape[3]])
        nodes.append(slice_node)
    graph.insert_before(graph[0], nodes)


def _choose(graph: ir.Graph, flag: ir.Value, cached: list[ir.Value], computed: list[ir.Value]) -> None:
    """Put `If(flag)` between values and their readers; nodes that only they need move into its branch."""
    moved = _only_for(graph, computed)
    chosen = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in computed]
    for old, new in zip(computed, chosen, strict=True):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = f"{old.name}.computed"
    graph.remove(moved)
    same = [ir.node("Identity", [value]) for value in cached]
    for node, value in zip(same, computed, strict=True):
        result = node.outputs[0]
        result.name, result.shape, result.type = str(value.name).replace("computed", "cached"), value.shape, value.type
    branches = {
        "then_branch": ir.Graph([], [node.outputs[0] for node in same], nodes=same, name="cached"),
        "else_branch": ir.Graph([], computed, nodes=moved, name="computed"),
    }
    attributes = [ir.AttrGraph(name, branch) for name, branch in branches.items()]
    graph.append(ir.Node("", "If", [flag], attributes, outputs=chosen))


def _only_for(graph: ir.Graph, values: list[ir.Value]) -> list[ir.Node]:
    """The nodes that nothing but these values needs, in order."""
    needed: set[ir.Node] = {producer for value in values if (producer := value.producer()) is not None}
    for node in reversed(graph):
        users = {user for output in node.outputs for user, _ in output.uses()}
        if users and users <= needed and not any(output.is_graph_output() for output in node.outputs):
            needed.add(node)
    return [node for node in graph if node in needed]


def _past_like(value: ir.Value, name: str) -> ir.Value:
    assert value.shape is not None
    shape = ir.Shape([*value.shape[:2], "past_encoder_sequence_length", value.shape[3]])
    return ir.Value(name=name, shape=shape, type=value.type)


def _input(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    return add_initializer(graph, ir.tensor([number], dtype=ir.DataType.INT64, name=name))
