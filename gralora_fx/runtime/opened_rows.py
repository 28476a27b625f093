"""The graph of rows as it is opened: two inputs more, so that a step can verify draft tokens.

As it is exported, `model_rows.onnx` gives logits after the last token of each row alone. And in the last bits, what a
token gives depends on whether others are read in the same step: ONNX Runtime has other kernels for the attention of one
token, and for its product with an adapter. In int4, whose products round activations to 8 bits, such bits become other
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx.helper import make_tensor_value_info

from gralora_fx.runtime.adapter_inputs import ADAPTER_IDS
from gralora_fx.runtime.export_directory import PAST_SEQLENS, QUERY_SEQLENS
from gralora_fx.tracing.inputs.cache_slots import keeps_state, past_slots

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
    Tokens that are multiplied with one adapter are two at least: `size` becomes `Max(size, 2)`.

    Args:
        model: The graph; its weights are not read.

    Returns:
        Whether it was changed. A graph that gives the logits of every token gets the second input alone; one whose head
        reads more than the tokens, such as the adapter of each row, neither; and one that keeps states neither, since
        its rows cannot be set back.
    """
    graph = model.graph
    is_grouped = _group_several(graph)
    if keeps_state(past_slots(graph.input)):
        return is_grouped
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in _read(node):
            readers.setdefault(name, []).append(node)
    has_logits = _gives_all(graph) or _choose_logits(graph, readers)
    return (has_logits and _choose_attention(graph, readers)) or is_grouped


def _group_several(graph: onnx.GraphProto) -> bool:
    """Let groups of tokens that share an adapter have room for two, whose second may be any token."""
    if all(value.name != ADAPTER_IDS for value in graph.input):
        return False
    sources = {name: node for node in graph.node for name in node.output}

    def is_size(node: onnx.NodeProto) -> bool:
        """Whether it gives the size of groups: the most tokens of an adapter, or of a part of a row."""
        kinds = [sources[name].op_type if name in sources else "" for name in node.input]
        return (node.op_type, kinds[-1:]) in (("ReduceMax", ["ReduceSum"]), ("Where", ["Min"]))

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if is_size(node):
            (name,) = node.output
            node.output[0] = f"{name}_counted"
            two = onnx.numpy_helper.from_array(np.array(2, dtype=np.int64))
            nodes.append(onnx.helper.make_node("Constant", [], [f"{name}_least"], value=two))
            nodes.append(onnx.helper.make_node("Max", [node.output[0], f"{name}_least"], [name]))
    is_changed = len(nodes) > len(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return is_changed


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
