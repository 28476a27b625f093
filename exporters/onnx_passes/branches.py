"""Branches of an ONNX graph, and nodes between a value and its readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

Branch = tuple[str, Sequence[ir.Node], ir.Value]  # a name, the nodes, and what they give


def choice(condition: ir.Value, then: Branch, otherwise: Branch, like: ir.Value) -> ir.Node:
    """A choice between two branches.

    Args:
        condition: Whether the first one is taken, a scalar.
        then: The first.
        otherwise: The second.
        like: A value of the result's shape and type.
    """
    for _, _, output in (then, otherwise):
        output.shape, output.type = like.shape, like.type
    branches = {
        key: _branch(nodes, output, name)
        for key, (name, nodes, output) in (("then_branch", then), ("else_branch", otherwise))
    }
    node = ir.node("If", [condition], attributes=branches)
    node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
    return node


def _branch(nodes: Sequence[ir.Node], output: ir.Value, name: str) -> ir.Graph:
    """A branch of a graph; its values have names that none outside it has."""
    for index, node in enumerate(nodes):
        node.name = f"{name}.{index}"
        for place, value in enumerate(node.outputs):
            value.name = f"{name}.{index}.{place}"
    return ir.Graph([], [output], nodes=nodes, name=name)


def replace_readers(old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes that compute a value from another one, and let the other's readers read it.

    Args:
        old: The value.
        new: What is computed from it.
        nodes: What computes it.
    """
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
    """The nodes of a node's branches."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
