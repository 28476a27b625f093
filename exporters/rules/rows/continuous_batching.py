"""A decoder's step for continuous batching: rows that read a chunk, rows that decode and idle rows in one run.

Attention sees rows of one length, padded on the right, and knows how many tokens of each count. All else computes on
the tokens that count, as one row of them, so that padding and idle rows cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from gralora_fx.base.features import parts
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.errors import listed
from gralora_fx.exporters.rules.builder import (
    ATTENTION,
    Builder,
    add_input,
    attributes_of,
    replace_value,
    sites_in,
    takes_row_count,
)
from gralora_fx.exporters.rules.clean_up import remove_unused_nodes
from gralora_fx.exporters.rules.onnx_pipeline import APART_ADDITIONS, FUSED_CACHED_ATTENTION
from gralora_fx.exporters.rules.rows.graph_ends import Head, head_of
from gralora_fx.exporters.rules.rows.row_tokens import (
    NUM_TOKENS,
    RowsError,
    RowTokens,
    last_tokens,
    row_tokens,
    take_tokens,
)
from gralora_fx.exporters.translation.names import layer_of
from gralora_fx.format.export_directory import ATTENTION_SEQLENS, LOGITS_INDICES, PAST_SEQLENS, QUERY_SEQLENS, ROWS_FORM
from gralora_fx.format.input_names import IDS, PAST_PREFIX, PRESENT_PREFIX, beside_ids

GQA = "GroupQueryAttention"
# positions of its inputs
_PAST_KEY, _PAST_VALUE, _LENGTHS, _TOTAL, _BIAS, _QUERY_LENGTHS = 3, 4, 5, 6, 10, 16
_NUM_LOGITS = "num_logits"
_ACROSS_TOKENS = frozenset({"Conv", "CumSum", "GRU", "LSTM", "RNN", "ReduceMax", "ReduceMin", "Scan"})
_LOOKED_THROUGH = frozenset({"Add", "Cast", "Identity", "Reshape", "Sub", "Unsqueeze"})


class CachedLayers(Protocol):
    """Layers other than attention that keep data of each row: a part of "rows", made from the unchanged model."""

    readers: Collection[str]  # operators that may read the cache

    def drop_padding_mask(self, mask: ir.Value, ids: ir.Value) -> None:
        """Remove the part of the layers that hides padding, since all tokens of a row count."""

    def values_of_rows(self) -> set[ir.Value]:
        """Return the values with one entry for each row, beside the cache: they keep their shapes."""

    def rewrite(self, tokens: RowTokens) -> int:
        """Let the layers read and return rows of tokens, in place; return how many layers there are."""


@contract(needs={FUSED_CACHED_ATTENTION})
def batch_continuously(model: ir.Model) -> PassResult[ir.Model]:
    """Let each row of a decoder's step read as many tokens as `query_seqlens` says, after `past_seqlens` cached ones.

    Before: `y, present... = GroupQueryAttention(f(input_ids, position_ids), past..., lengths, total, bias)`
    After:  `y, present... = GroupQueryAttention(rows(f(tokens, positions)), past..., lengths, total, attended)`

    `tokens [1, tokens]` are the ids that count, `rows` scatters values to `[batch, length]`, and attention's output is
    gathered to `[1, tokens]` again. Mask and positions follow from the lengths, and are no inputs. If input and output
    of a cache are one buffer, an idle row's cache stays as it is.

    `attended` is `Max(query_seqlens, attention_seqlens)`: ONNX Runtime's attention kernel for one token differs from
    that for several in the last bits, so rows that verify tokens ask for the latter. A model that keeps states lacks
    that input, since its rows cannot be set back.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    _check_inputs(inputs)
    ids = inputs["input_ids"]
    assert ids.shape is not None
    batch, length = ids.shape
    if isinstance(batch, int) or isinstance(length, int):
        raise RowsError(f"input_ids has a fixed shape, [{batch}, {length}]; trace the model with dynamic=True")
    layers = [node for node in graph if node.op_type == GQA]
    signs = {f"{node.domain}::{node.op_type}" for node in graph}
    others: list[CachedLayers] = [layers_of(model) for layers_of in parts("rows", signs)]
    _check_layers(graph, layers)
    for other in others if "attention_mask" in inputs else ():
        other.drop_padding_mask(inputs["attention_mask"], ids)
    _rename_inner(graph, str(batch), str(length), others)
    query, past = (add_input(graph, name, ir.DataType.INT32, [batch]) for name in (QUERY_SEQLENS, PAST_SEQLENS))
    build = Builder(graph)
    readers = {name: list(value.uses()) for name, value in inputs.items()}
    attended = query
    if not others:
        attended = build("Max", query, add_input(graph, ATTENTION_SEQLENS, ir.DataType.INT32, [batch]))
    tokens = row_tokens(build, ids, query, past, attended)
    build.insert_before(graph[0])
    for name, value in (("input_ids", tokens.ids), ("position_ids", tokens.positions)):
        for usage in readers.get(name, []):
            usage.node.replace_input_with(usage.idx, value)
    for name, beside in beside_ids(inputs).items():
        if beside.axis is None:
            continue
        of_tokens = tokens.of_input(build, inputs[name], beside.axis)
        build.insert_before(next(node for node in graph if node in {usage.node for usage in readers[name]}))
        for usage in readers[name]:
            usage.node.replace_input_with(usage.idx, of_tokens)
    _count_one_row(inputs, tokens.ids)
    for node in layers:
        _by_rows(graph, node, tokens)
    changed = len(layers) + sum(other.rewrite(tokens) for other in others)
    for value in graph.outputs[1:]:
        past_value = inputs[str(value.name).replace(PRESENT_PREFIX, PAST_PREFIX)]
        value.shape = past_value.shape
    remove_unused_nodes(model)
    _check_readers(inputs, {GQA}.union(*(other.readers for other in others)))
    graph.inputs[:] = [value for value in graph.inputs if value.name not in ("attention_mask", "position_ids")]
    model.metadata_props[ROWS_FORM] = "2"
    return PassResult(changed)


def _by_rows(graph: ir.Graph, node: ir.Node, tokens: RowTokens) -> None:
    """Let attention read and return rows of tokens."""
    before = Builder(graph)
    new_inputs = [*node.inputs, *[None] * (_QUERY_LENGTHS + 1 - len(node.inputs))]
    for index in range(3):
        value = new_inputs[index]
        if value is not None:
            new_inputs[index] = tokens.to_rows(before, value)
    new_inputs[_LENGTHS], new_inputs[_TOTAL], new_inputs[_BIAS] = tokens.cached, tokens.total, None
    new_inputs[_QUERY_LENGTHS] = tokens.attended
    new = before.node(GQA, new_inputs, domain=node.domain, num_outputs=3, **attributes_of(node))
    new.metadata_props.update(node.metadata_props)
    output = tokens.of_rows(before, new.outputs[0])
    old_shape = node.outputs[0].shape
    new.outputs[0].shape = None if old_shape is None else ir.Shape([*tokens.sizes, old_shape[-1]])
    new.outputs[0].type = node.outputs[0].type
    before.insert_before(node)
    for fresh, old in zip((output, *new.outputs[1:]), node.outputs, strict=True):
        replace_value(fresh, old)
    graph.remove(node, safe=True)


def _count_one_row(inputs: Mapping[str, ir.Value], ids: ir.Value) -> None:
    """Redirect nodes that read the number of rows from a mask or a cache to the tokens, which are one row."""
    for name, value in inputs.items():
        for usage in list(value.uses()) if name != "input_ids" else ():
            if takes_row_count(usage.node):
                usage.node.replace_input_with(0, ids)


def _rename_inner(graph: ir.Graph, batch: str, length: str, others: Sequence[CachedLayers]) -> None:
    """Give computed values their new symbolic sizes; ONNX Runtime's memory plan relies on them."""
    tokens = ir.SymbolicDim(NUM_TOKENS)
    names: dict[str, int | ir.SymbolicDim] = {
        batch: 1,
        length: tokens,
        f"{batch}*{length}": tokens,
        f"{length}*{batch}": tokens,
    }
    of_rows = set[ir.Value]().union(*(other.values_of_rows() for other in others))
    for node in graph:
        for value in node.outputs:
            if value.shape is None or value in of_rows:
                continue
            unknown = ir.SymbolicDim(None)
            value.shape = ir.Shape(
                [size if isinstance(size, int) else names.get(str(size), unknown) for size in value.shape]
            )


def _check_inputs(inputs: Mapping[str, ir.Value]) -> None:
    known = ("input_ids", "attention_mask", "position_ids", *beside_ids(inputs))
    others = [name for name in inputs if name not in known and not name.startswith(PAST_PREFIX)]
    if others or "input_ids" not in inputs:
        what = f"also takes {listed(others)}" if others else "takes no input_ids"
        raise RowsError(f"rows of their own lengths are for a decoder of input_ids alone, and this one {what}")


def _check_layers(graph: ir.Graph, layers: Sequence[ir.Node]) -> None:
    """Check that every layer's attention has its own cache, and that no other operator mixes tokens."""
    owners: dict[ir.Value, str] = {}
    problems: list[str] = []
    for node in layers:
        for index in (_PAST_KEY, _PAST_VALUE):
            past = node.inputs[index]
            assert past is not None
            if past in owners and index == _PAST_KEY:
                problems.append(f"{layer_of(node)} has the cache of {owners[past]}")
            owners.setdefault(past, layer_of(node))
    problems += [f"{layer_of(node)} has attention without a cache" for node in graph if node.op_type in ATTENTION]
    problems += [f"{layer_of(node)} computes {node.op_type} over positions" for node in _across_positions(graph)]
    if problems:
        raise RowsError(f"rows of a batch cannot be at different positions: {listed(problems)}")


def _across_positions(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes that combine several positions: those that always do, and some that read `position_ids`."""
    yield from (node for node in graph if node.op_type in ("Conv", "GRU", "LSTM", "RNN", "Scan"))
    waiting = [value for value in graph.inputs if value.name == "position_ids"]
    while waiting:
        for usage in waiting.pop().uses():
            if usage.node.op_type in _ACROSS_TOKENS:
                yield usage.node
            elif usage.node.op_type in _LOOKED_THROUGH:
                waiting += usage.node.outputs


def _check_readers(inputs: Mapping[str, ir.Value], known: Collection[str]) -> None:
    """Check that nothing but known operators reads the cache, and nothing the mask."""
    problems, of_tokens = [], {IDS, *beside_ids(inputs)}
    for name, value in inputs.items():
        for usage in value.uses():
            is_cache = name.startswith(PAST_PREFIX) and usage.node.op_type in known
            if not is_cache and name not in of_tokens:
                problems.append(f"{layer_of(usage.node)} reads {name} ({usage.node.op_type})")
    if problems:
        raise RowsError(f"the model needs more than the lengths of its rows: {listed(sorted(set(problems)), 6)}")


@contract(needs={APART_ADDITIONS})
@dataclass(frozen=True)
class LogitsOfRows:
    """Compute logits by row: of chosen tokens, or of every position.

    Before: `logits = MatMul(x, head)`, of the tokens that count
    After:  `logits = MatMul(Gather(x, logits_indices or last), head)`, or `logits = rows(MatMul(x, head))`

    The input `logits_indices` chooses tokens; if it is empty, the last of each row. There is no such input if the head
    reads more than the tokens, such as the adapter of each row, or if the model keeps states. Logits of idle rows and
    uncounted positions mean nothing.
    """

    logits: str  # `"last"` or `"all"`

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Change the first output, in place."""
        inputs = {str(value.name): value for value in model.graph.inputs}
        ids, query = inputs["input_ids"], inputs[QUERY_SEQLENS]
        build = Builder(model.graph)
        if self.logits == "last":
            head = head_of(model)
            assert ids.shape is not None
            index, count = last_tokens(build, query), ids.shape[0]
            if ATTENTION_SEQLENS in inputs and _reads_tokens_alone(head):
                chosen = add_input(model.graph, LOGITS_INDICES, ir.DataType.INT64, [_NUM_LOGITS])
                index, count = _chosen_or(build, chosen, index), ir.SymbolicDim(_NUM_LOGITS)
            head.read(build, take_tokens(build, head.hidden, index, (count, 1)))
            return PassResult(1)
        logits = model.graph.outputs[0]
        rows = row_tokens(build, ids, query, inputs[PAST_SEQLENS]).to_rows(build, logits)
        build.insert_after(logits)
        rows.name, logits.name = logits.name, f"{logits.name}.tokens"
        model.graph.outputs[0] = rows
        return PassResult(1)


def _chosen_or(build: Builder, chosen: ir.Value, otherwise: ir.Value) -> ir.Value:
    """Return `[num_logits, 1]`: the chosen tokens `[num_logits]`, or the others `[batch, 1]` if none are chosen."""
    number = build("Shape", chosen)
    end = build("Where", build("Cast", number, to=ir.DataType.BOOL), number, build("Shape", otherwise, end=1))
    both = build("Concat", build("Unsqueeze", chosen, [1]), otherwise, axis=0)
    return build("Slice", both, [0], end, [0])


def _reads_tokens_alone(head: Head) -> bool:
    """Return whether a token's logits depend on nothing but the token: no row's adapter, no other input."""
    members = {head.hidden, *head.chain}
    if any(sites_in(value) for value in members - {head.hidden}):
        return False
    waiting = [value for member in head.chain for value in _read_for(member) if value not in members]
    while waiting:
        value = waiting.pop()
        if value.is_graph_input() and value.const_value is None:
            return False
        waiting += _read_for(value)
    return True


def _read_for(value: ir.Value) -> list[ir.Value]:
    """Return the input of the node that computes a value."""
    node = value.producer()
    return [] if node is None else [read for read in node.inputs if read is not None]
