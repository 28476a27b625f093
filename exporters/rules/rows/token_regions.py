"""Parts of a graph that compute each token by itself, between one attention and the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from gralora_fx.exporters.rules.builder import ATTENTION, const_ints, static_dim

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sign", "Softplus",
    "Softsign", "Sqrt", "Sub", "Tanh", "Where",
})
# fmt: on
NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
ALONG_FEATURES = frozenset({"Concat", "Slice", "Split"})  # token by token if they act on the last axis

Dims = tuple[str, str]


@dataclass
class TokenRegion:
    """The token tensors `[batch, length, features]` of a sequence, and the nodes that compute them."""

    dims: Dims  # batch and length, as text; a number where the size is fixed
    nodes: list[ir.Node] = field(default_factory=list)  # nodes that compute every token by itself, in the graph's order
    attention: list[ir.Node] = field(default_factory=list)  # attention with queries of this sequence
    values: set[ir.Value] = field(default_factory=set)  # the outputs of all these nodes


def token_regions(graph: ir.Graph) -> list[TokenRegion]:
    """Return the regions of a graph around its attention, one for each size of sequence."""
    regions: dict[Dims, TokenRegion] = {}
    attention: dict[Dims, list[ir.Node]] = {}
    candidates: dict[Dims, list[ir.Node]] = {}
    for node in graph:
        dims = _tokens_of(node)
        if dims is not None:
            candidates.setdefault(dims, []).append(node)
        elif node.op_type in ATTENTION and (query_dims := token_dims(node.inputs[0])) is not None:
            if node.outputs[0].shape is None or len(node.outputs[0].shape) != 3:
                continue
            attention.setdefault(query_dims, []).append(node)
    for dims, nodes in attention.items():
        region = TokenRegion(dims, attention=nodes)
        region.nodes = _connected(candidates.get(dims, []), [*_attention_around(attention, dims)])
        region.values = {node.outputs[0] for node in nodes} | {v for node in region.nodes for v in node.outputs}
        regions[dims] = region
    return list(regions.values())


def _attention_around(attention: dict[Dims, list[ir.Node]], dims: Dims) -> Iterator[ir.Node]:
    """Yield attention whose queries, keys or values are of a sequence."""
    for nodes in attention.values():
        yield from (node for node in nodes if any(token_dims(value) == dims for value in node.inputs[:3]))


def token_dims(value: ir.Value | None) -> Dims | None:
    """Return batch and length of a token tensor `[batch, length, features]` of fixed features; None for others."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return None
    batch, length, features = value.shape
    if not isinstance(features, int):
        return None
    return str(batch), str(length)


def _tokens_of(node: ir.Node) -> Dims | None:
    """Return batch and length of the token tensors that a node computes token by token; None for other nodes."""
    if node.domain != "" or any(usage.node.graph is not node.graph for value in node.outputs for usage in value.uses()):
        return None  # a branch of a condition reads it
    if node.op_type == "MatMul":
        x, weight = node.inputs
        width, dims, output = _width(weight), token_dims(x), node.outputs[0]
        if width is None:
            return None
        if dims is not None and output.shape is None and x is not None and x.shape is not None:
            output.shape, output.type = ir.Shape([*x.shape[:2], width]), x.type
        return dims
    if node.op_type in NORMS:
        axis = node.attributes.get("axis")
        is_last = axis is None or axis.as_int() in (-1, 2)
        dims = token_dims(node.inputs[0]) if is_last and not any(v.uses() for v in node.outputs[1:]) else None
        return dims if dims == token_dims(node.outputs[0]) else None
    if node.op_type in _ELEMENTWISE:
        return _same_tokens(node)
    return _along_features(node) if node.op_type in ALONG_FEATURES else None


def _width(weight: ir.Value | None) -> int | None:
    """Return the number of columns of a matrix that is an initializer or its transpose (a tied embedding), or None."""
    node = None if weight is None else weight.producer()
    is_transposed = node is not None and node.op_type == "Transpose"
    source = node.inputs[0] if is_transposed and node is not None else weight
    if source is None or not source.is_initializer() or source.shape is None or len(source.shape) != 2:
        return None
    return static_dim(source, 0 if is_transposed else 1)


def _same_tokens(node: ir.Node) -> Dims | None:
    """Return batch and length of an elementwise node whose inputs are one sequence's tokens or equal for all tokens."""
    tokens = [value for value in node.inputs if value is not None and not _is_of_features(value)]
    all_dims = {token_dims(value) for value in tokens}
    dims = all_dims.pop() if len(all_dims) == 1 else None
    output = node.outputs[0]
    if dims is not None and output.shape is None and len({str(value.shape) for value in tokens}) == 1:
        output.shape = tokens[0].shape
        output.type = output.type if node.op_type == "Cast" else tokens[0].type
    return dims if token_dims(output) == dims else None


def _is_of_features(value: ir.Value) -> bool:
    """Return whether a value is the same for every token: a number, or a vector of features."""
    tensor = ir.convenience.get_const_tensor(value) if value.shape is None else value
    return tensor is not None and tensor.shape is not None and len(tensor.shape) <= 1


def _along_features(node: ir.Node) -> Dims | None:
    """Return batch and length of a node that slices, splits or concatenates features."""
    tokens = list(node.inputs) if node.op_type == "Concat" else [node.inputs[0]]
    if node.op_type == "Slice":
        axes = const_ints(node.inputs[3]) if len(node.inputs) > 3 else None
        last = axes in ([-1], [2])
    else:
        axis = node.attributes.get("axis")
        last = axis is not None and axis.as_int() in (-1, 2)
    all_dims = {token_dims(value) for value in tokens}
    dims = all_dims.pop() if len(all_dims) == 1 and last else None
    return dims if all(token_dims(output) == dims for output in node.outputs) else None


def _connected(nodes: list[ir.Node], attention: list[ir.Node]) -> list[ir.Node]:
    """Return the nodes that are connected to attention through nodes of the list."""
    inside, connected = set(nodes), set()
    waiting = list(attention)
    while waiting:
        node = waiting.pop()
        before = [value.producer() for value in node.inputs if value is not None]
        after = [usage.node for output in node.outputs for usage in output.uses()]
        for other in (*before, *after):
            if other is not None and other in inside and other not in connected:
                connected.add(other)
                waiting.append(other)
    return [node for node in nodes if node in connected]
