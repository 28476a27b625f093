"""Attention of batches without padding: no mask, and no tokens to put back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from gralora_fx.exporters.onnx_passes.builder import Builder
from gralora_fx.exporters.onnx_passes.encoder_attention import KEY_MASK, PADDING
from gralora_fx.exporters.onnx_passes.flatten_tokens import WITH_PADDING, WITHOUT_PADDING
from gralora_fx.exporters.pipeline import PassResult


def branch_on_padding(model: ir.Model) -> PassResult[ir.Model]:
    """Choose at run time between attention with a padding mask and attention without one.

    Before: `y = Gather(MultiHeadAttention(Gather(q, places), Gather(k, places), Gather(v, places), padding), tokens)`
    After:  `y = If(all of padding)`, one branch of which is that, the other
            `Reshape(MultiHeadAttention(Reshape(q), Reshape(k), Reshape(v)))`

    Without a mask ONNX Runtime's kernel never holds all scores at once, and takes 0.7 of the time; and where nothing is
    padded, rows of tokens are in their places already. Weights are in no branch.

    Args:
        model: A model with `MultiHeadAttention`, its tokens flattened; it is changed in place.

    Returns:
        The number of branches.
    """
    conditions: dict[ir.Value, _Condition] = {}
    count = 0
    for node in list(model.graph):
        padding = node.meta.get(PADDING)
        if node.op_type != "MultiHeadAttention" or padding is None or len(node.inputs) <= KEY_MASK:
            continue
        if node.inputs[KEY_MASK] is None:
            continue
        if padding not in conditions:
            conditions[padding] = _Condition.before(model.graph, node, padding)
        _branch(model.graph, node, conditions[padding])
        count += 1
    return PassResult(count)


@dataclass
class _Condition:
    """What tells batches without padding, and the shapes of their token tensors.

    Attributes:
        holds: A boolean, true where nothing is padded.
        sizes: Batch and length.
        shapes: Shapes of token tensors by width.
    """

    holds: ir.Value
    sizes: ir.Value
    shapes: dict[int, ir.Value]

    @classmethod
    def before(cls, graph: ir.Graph, node: ir.Node, padding: ir.Value) -> _Condition:
        """Make both before a node."""
        build = Builder(graph)
        least = build("ReduceMin", node.inputs[KEY_MASK], keepdims=0)
        found = cls(build("Cast", least, to=ir.DataType.BOOL), build("Shape", padding, start=0, end=2), {})
        build.insert_before(node)
        return found

    def shape(self, graph: ir.Graph, width: int, node: ir.Node) -> ir.Value:
        """The shape of a token tensor, made before a node."""
        if width not in self.shapes:
            build = Builder(graph)
            self.shapes[width] = build("Concat", self.sizes, build.ints(width), axis=0)
            build.insert_before(node)
        return self.shapes[width]


def _branch(graph: ir.Graph, node: ir.Node, condition: _Condition) -> None:
    before = [_moved(value) for value in node.inputs[:3]]
    after = _tokens_after(node)
    old = after[-1].outputs[0] if after else node.outputs[0]
    build = Builder(graph)
    tokens = []
    for value, gather in zip(node.inputs[:3], before, strict=True):
        matrix = None if gather is None else gather.inputs[0]
        if matrix is None or matrix.shape is None:
            tokens.append(value)
        else:
            tokens.append(build("Reshape", matrix, condition.shape(graph, int(str(matrix.shape[1])), node)))
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = [*tokens, None, None, *node.inputs[KEY_MASK + 1 :]]
    result = build.node("MultiHeadAttention", inputs, domain=node.domain, **options).outputs[0]
    if after:
        result = build("Reshape", result, after[0].inputs[1])
    unmasked = build.take()
    masked = [*dict.fromkeys(gather for gather in before if gather is not None), node, *after]
    _name(unmasked, f"{old.name}.unpadded")
    chosen = ir.Value(name=old.name, shape=old.shape, type=old.type)
    ir.convenience.replace_all_uses_with(old, chosen, replace_graph_outputs=True)
    old.name = f"{old.name}.padded"
    result.shape, result.type = old.shape, old.type
    place = masked[-1]
    branches = [
        ir.AttrGraph("then_branch", ir.Graph([], [result], nodes=unmasked, name="unpadded")),
    ]
    choice = ir.Node("", "If", [condition.holds], branches, outputs=[chosen], name=f"{chosen.name}.if")
    graph.insert_after(place, choice)
    graph.remove(masked)
    padded = ir.Graph([], [old], nodes=masked, name="padded")
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", padded)


def _moved(value: ir.Value | None) -> ir.Node | None:
    """The node that puts tokens of a matrix in their places, if nothing else reads the result."""
    node = None if value is None else value.producer()
    is_moved = node is not None and WITH_PADDING in node.meta and value is not None and len(value.uses()) == 1
    return node if is_moved else None


def _tokens_after(node: ir.Node) -> list[ir.Node]:
    """The nodes that take tokens of attention's result out of the padded form, if nothing else reads it."""
    found: list[ir.Node] = []
    value = node.outputs[0]
    for kind in ("Reshape", "Gather"):
        users = [usage.node for usage in value.uses()]
        if len(users) != 1 or users[0].op_type != kind or value.is_graph_output():
            return []
        found.append(users[0])
        value = users[0].outputs[0]
    return found if WITHOUT_PADDING in found[-1].meta else []


def _name(nodes: Iterable[ir.Node], prefix: str) -> None:
    """Name the values of a branch, which may not have the names of values around it."""
    for index, node in enumerate(nodes):
        node.name = f"{prefix}.{index}"
        for output in node.outputs:
            output.name = f"{prefix}.{index}"
