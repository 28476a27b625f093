"""The graph of rows as it is opened: two inputs more, so that a step can verify draft tokens.

As it is exported, `model_rows.onnx` gives logits after the last token of each row alone. And in the last bits, what a
token gives depends on whether its row reads others in the same step: ONNX Runtime has another kernel for the attention
of one. In int4, whose products round activations to 8 bits, such bits become other tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx
from onnx.helper import make_tensor_value_info

from gralora_fx.runtime.export_directory import PAST_SEQLENS, QUERY_SEQLENS

LOGITS_INDICES = "logits_indices"  # `[num_logits]` int64: tokens that get logits, among those that count, row by row
ATTENTION_SEQLENS = "attention_seqlens"  # `[batch]` int32: tokens of each row for attention, whose kernel that chooses
_NUM_LOGITS = "num_logits"
_LAST_TOKENS = ("Cast", "CumSum", "Sub", "Max", "Unsqueeze", "Gather")  # what takes the last token of each row
_QUERY_INPUT = 16  # of GroupQueryAttention


def open_rows(model: onnx.ModelProto) -> bool:
    """Add the inputs to a graph of rows, in place.

    Before: `logits = head(Gather(x, Unsqueeze(Max(CumSum(query_seqlens) - 1, 0))))`, `[batch, 1, vocabulary]`;
            `y = GroupQueryAttention(..., past_seqlens + query_seqlens - 1, query_seqlens)`
    After:  `logits = head(Gather(x, Unsqueeze(logits_indices)))`, `[num_logits, 1, vocabulary]`;
            `y = GroupQueryAttention(..., past_seqlens + attention_seqlens - 1, attention_seqlens)`

    Args:
        model: The graph; its weights are not read.

    Returns:
        Whether it was changed. A graph that gives the logits of every token gets the second input alone; one whose head
        reads more than the tokens, such as the adapter of each row, neither.
    """
    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in _read(node):
            readers.setdefault(name, []).append(node)
    return (_gives_all(graph) or _choose_logits(graph, readers)) and _choose_attention(graph, readers)


def _gives_all(graph: onnx.GraphProto) -> bool:
    return bool(graph.output[0].type.tensor_type.shape.dim[1].dim_value != 1)


def _choose_logits(graph: onnx.GraphProto, readers: Mapping[str, list[Any]]) -> bool:
    chains = list(_chains(readers, QUERY_SEQLENS, _LAST_TOKENS))
    if len(chains) != 1:
        return False
    *_, unsqueeze, gather = chains[0]
    head = _after([gather], readers)
    of_inputs = _after((node for value in graph.input for node in readers.get(value.name, ())), readers)
    varying = {value.name for value in graph.input} | of_inputs.keys()
    others = {name for node in head.values() if node is not gather for name in _read(node)} - head.keys()
    if graph.output[0].name not in head or not varying.isdisjoint(others):
        return False
    unsqueeze.input[0] = LOGITS_INDICES
    graph.input.append(make_tensor_value_info(LOGITS_INDICES, onnx.TensorProto.INT64, [_NUM_LOGITS]))
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = _NUM_LOGITS
    kept = [value for value in graph.value_info if value.name not in {*head, *unsqueeze.output}]
    del graph.value_info[:]  # the others have other sizes now, and ONNX Runtime plans its memory by them
    graph.value_info.extend(kept)
    return True


def _choose_attention(graph: onnx.GraphProto, readers: Mapping[str, list[Any]]) -> bool:
    readings = readers.get(QUERY_SEQLENS, ())
    sums = [node for node in readings if node.op_type == "Add" and PAST_SEQLENS in node.input]
    layers = [node for node in readings if node.op_type == "GroupQueryAttention"]
    if not sums or not layers:
        return False
    for node in sums:
        node.input[list(node.input).index(QUERY_SEQLENS)] = ATTENTION_SEQLENS
    for node in layers:
        node.input[_QUERY_INPUT] = ATTENTION_SEQLENS
    (batch,) = next(value for value in graph.input if value.name == QUERY_SEQLENS).type.tensor_type.shape.dim
    graph.input.append(make_tensor_value_info(ATTENTION_SEQLENS, onnx.TensorProto.INT32, [batch.dim_param]))
    return True


def _chains(readers: Mapping[str, list[Any]], name: str, operators: tuple[str, ...]) -> Iterator[list[Any]]:
    """Nodes of some operators, each of which reads what the one before it gives, the first a value."""
    for node in readers.get(name, ()):
        if node.op_type == operators[0]:
            ends = _chains(readers, node.output[0], operators[1:]) if operators[1:] else [[]]
            yield from ([node, *end] for end in ends)


def _after(nodes: Iterable[Any], readers: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Some nodes and all that depend on them, by the names of what they give."""
    found: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        new = [name for name in node.output if name not in found]
        found |= dict.fromkeys(new, node)
        waiting += [reader for name in new for reader in readers.get(name, ())]
    return found


def _read(node: Any) -> Iterator[str]:
    """What a node reads, in its branches too."""
    yield from node.input
    for attribute in node.attribute:
        for branch in (attribute.g, *attribute.graphs):
            for inner in branch.node:
                yield from _read(inner)
