"""Branches and loops of an ONNX graph, whose nodes hold graphs; and functions of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from gralora_fx.exporters.rules.builder import FUNCTIONS, Builder

Branch = tuple[str, Sequence[ir.Node], ir.Value]  # a name, the nodes and their output


def choice(condition: ir.Value, then: Branch, otherwise: Branch, like: ir.Value) -> ir.Node:
    """Create an `If` node of two branches with one output."""
    for _, _, output in (then, otherwise):
        output.shape, output.type = like.shape, like.type
    branches = {
        key: named_graph([], [output], nodes, name)
        for key, (name, nodes, output) in (("then_branch", then), ("else_branch", otherwise))
    }
    node = ir.node("If", [condition], attributes=branches)
    node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
    return node


def named_graph(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node], name: str
) -> ir.Graph:
    """Create the graph within a node; its values get names that none outside it has."""
    for index, node in enumerate(nodes):
        node.name = f"{name}.{index}"
        for place, value in enumerate(node.outputs):
            value.name = f"{name}.{index}.{place}"
    return ir.Graph(inputs, outputs, nodes=nodes, name=name)


def loop(
    build: Builder, count: ir.Value, part: Callable[[Builder, ir.Value], ir.Value], dtype: ir.DataType, name: str
) -> ir.Value:
    """Build a `Loop` that returns a sequence of tensors, whose sizes may differ."""
    kind = ir.SequenceType(ir.TensorType(dtype))
    empty = build("SequenceEmpty", dtype=dtype)
    inputs = [
        ir.Value(name=f"{name}.index", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64)),
        ir.Value(name=f"{name}.goes_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL)),
        ir.Value(name=f"{name}.parts", type=kind),
    ]
    inner = Builder(build.graph)
    longer = inner("SequenceInsert", inputs[2], part(inner, inputs[0]))
    goes_on = inner("Identity", inputs[1])
    goes_on.type, goes_on.shape, longer.type = inputs[1].type, inputs[1].shape, kind
    body = named_graph(inputs, [goes_on, longer], inner.take(), name)
    return build("Loop", count, build("Constant", value=ir.tensor(np.asarray(True))), empty, body=body)


def replace_readers(old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes that compute a value from another one, and redirect the other's readers to it."""
    producer = old.producer()
    assert producer is not None
    graph = producer.graph
    assert isinstance(graph, ir.Graph)
    new.shape, new.type = old.shape, old.type
    readers = list(old.uses())
    graph.insert_after(producer, nodes)
    added = {node for top in nodes for node in (top, *_inner(top))}
    for usage in readers:
        if usage.node not in added:
            usage.node.replace_input_with(usage.idx, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.name, old.name = old.name, f"{old.name}.base"
            graph.outputs[index] = new


def _inner(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes of a node's branches."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def add_function(
    model: ir.Model, name: str, inputs: Sequence[str], body: Callable[..., Mapping[str, ir.Value]]
) -> None:
    """Add a function to a model, unless it has one of that name."""
    if (FUNCTIONS, name, "") in model.functions:
        return
    values, opset = [ir.Value(name=input_name) for input_name in inputs], model.graph.opset_imports[""]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": opset}, name=name)
    build = Builder(graph)
    outputs = body(build, *values)
    for output_name, output in outputs.items():
        output.name = output_name
    graph.extend(build.take())
    graph.outputs.extend(outputs.values())
    function = ir.Function(FUNCTIONS, name, graph=graph, attributes=[])
    model.functions[function.identifier()] = function
