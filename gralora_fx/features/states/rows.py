"""Layers with a state in a graph with row lengths.

A row's state is that after its own tokens: padding behind them neither decays it nor adds to it, and an idle row
keeps its own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.branches import replace_readers
from gralora_fx.exporters.rules.builder import (
    MICROSOFT,
    Builder,
    attributes_of,
    fixed_dim,
    replace_value,
    takes_row_count,
)
from gralora_fx.exporters.rules.rows.row_tokens import RowsError, RowTokens, longest_row
from gralora_fx.exporters.translation.names import layer_of
from gralora_fx.features.states.forms import (
    channels_last,
    clamp_rows,
    fits_convolution,
    replace_channels_first,
    swaps_last_axes,
)
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.export_directory import TRANSPOSED_STATES
from gralora_fx.format.input_names import PAST_PREFIX

_CHANNELS_LAST = [0, 2, 1]
_OF_STATES = frozenset({"Reshape", "Transpose"})  # operators on states of single numbers, or channels-last ones
STATE = 3  # the position of the state among the inputs of either operator


class RowStates:
    """Rewrites a graph's operators with a state; shared values are computed once."""

    def __init__(self, graph: ir.Graph, tokens: RowTokens) -> None:
        self._graph, self._tokens = graph, tokens
        self._shared: dict[tuple[str, int, int], ir.Value] = {}
        self._rows: RowTokens | None = None
        self._is_read: ir.Value | None = None

    def rewrite(self, node: ir.Node) -> None:
        """Let an operator of `STATE_OPERATORS` read and return rows of tokens, in place."""
        build = Builder(self._graph)
        if self._rows is None:
            self._rows = longest_row(build, self._tokens)
            self._is_read = self._rows.is_read(build)
        STATE_OPERATORS[node.op_type](self, build, node)
        build.insert_before(node)
        self._graph.remove(node, safe=True)

    def _convolve(self, build: Builder, node: ir.Node) -> None:
        """Rewrite a convolution: its next state is the last inputs of the row's own tokens.

        Before: `y, next = CausalConvWithState(x, weight, bias, state)`
        After:  `y = CausalConvWithState(rows(x), weight, bias, state)` of the tokens, and
                `next = GatherElements(Concat(state, rows(x)), query_seqlens + (0, 1, ...))`, channels last
        """
        rows, (x, weight, bias, state) = self._rows, (*node.inputs, None, None)[:4]
        assert rows is not None
        assert x is not None
        if state is None:
            raise RowsError(f"{layer_of(node)} has a convolution without a state of its own")
        channels, kept = fixed_dim(state, 1), fixed_dim(state, 2)
        by_row = rows.to_rows(build, channels_last(build, x))
        joined = build("Concat", channels_last(build, state), by_row, axis=1)
        operands = [build("Transpose", by_row, perm=_CHANNELS_LAST), weight, bias, state]
        fused = build.node("CausalConvWithState", operands, domain=MICROSOFT, num_outputs=2, **attributes_of(node))
        y = rows.of_rows(build, build("Transpose", fused.outputs[0], perm=_CHANNELS_LAST))
        replace_channels_first(build, y, node.outputs[0])
        if ("last", channels, kept) not in self._shared:
            self._shared["last", channels, kept] = _last_inputs(build, rows.query, channels, kept)
        last = build("GatherElements", joined, self._shared["last", channels, kept], axis=1)
        replace_channels_first(build, last, node.outputs[1])

    def _attend(self, build: Builder, node: ir.Node) -> None:
        """Rewrite linear attention: padding has key 0, decay 0 and beta 0.

        Before: `y, next = LinearAttention(query, key, value, state, decay, beta)`
        After:  the same on rows of tokens, with `Where(is_read, rows(key), 0)` and so on
        """
        rows, (query, key, value, state, decay, beta) = self._rows, (*node.inputs, None, None)[:6]
        assert rows is not None
        taken: list[ir.Value | None] = []
        for operand, is_zeroed in ((query, False), (key, True), (value, False), (decay, True), (beta, True)):
            by_row = None if operand is None else rows.to_rows(build, operand)
            if operand is not None and by_row is not None and is_zeroed:
                zero = build.tensor(0.0, operand.dtype or ir.DataType.FLOAT)
                by_row = build("Where", self._is_read, by_row, zero)
                by_row.shape = None if operand.shape is None else ir.Shape([None, None, operand.shape[2]])
                by_row.type = operand.type
            taken.append(by_row)
        operands = [*taken[:3], state, *taken[3:]]
        fused = build.node("LinearAttention", operands, domain=MICROSOFT, num_outputs=2, **attributes_of(node))
        replace_value(rows.of_rows(build, fused.outputs[0]), node.outputs[0])
        replace_value(fused.outputs[1], node.outputs[1])


STATE_OPERATORS: dict[str, Callable[[RowStates, Builder, ir.Node], None]] = {
    "CausalConvWithState": RowStates._convolve,
    "LinearAttention": RowStates._attend,
}


class StateRows:
    """Layers with a state as layers of rows (see `CachedLayers`)."""

    # a concatenation is of a convolution's state and inputs
    readers = frozenset({"Concat", *_OF_STATES, *STATE_OPERATORS})

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._nodes = [node for node in model.graph if node.op_type in STATE_OPERATORS]

    def drop_padding_mask(self, mask: ir.Value, ids: ir.Value) -> None:
        """Remove the padding mask from layers with a state, since all tokens of a row count.

        Before: `y = Mul(x, Cast(Unsqueeze(Slice(attention_mask))))`, the mask of the new positions
        After:  `y = x`
        """
        for usage in list(mask.uses()):
            new = usage.node.outputs[0]
            if usage.node.op_type == "Slice" and new.shape is not None and new.shape == ids.shape:
                for product, other in list(_products(new)):
                    for reader in list(product.outputs[0].uses()):
                        reader.node.replace_input_with(reader.idx, other)

    def values_of_rows(self) -> set[ir.Value]:
        """Return the next states, and other views of states."""
        states = {value for value in self._model.graph.inputs if str(value.name).startswith(PAST_PREFIX)}
        for node in self._model.graph:
            if node.op_type in STATE_OPERATORS:
                states.add(node.outputs[1])
            elif node.op_type in _OF_STATES and node.inputs[0] in states:
                states.add(node.outputs[0])
        return states

    def rewrite(self, tokens: RowTokens) -> int:
        """Let the layers read and return rows of tokens, in place; return the number of layers."""
        clamp_rows(self._model, tokens)
        states = RowStates(self._model.graph, tokens)
        for node in self._nodes:
            states.rewrite(node)
        return len(self._nodes)


def _products(mask: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield products with a mask, and their other factors."""
    for usage in mask.uses():
        if usage.node.op_type in ("Unsqueeze", "Cast"):
            yield from _products(usage.node.outputs[0])
        elif usage.node.op_type == "Mul":
            other = usage.node.inputs[1 - usage.idx]
            assert other is not None
            yield usage.node, other


def _last_inputs(build: Builder, query: ir.Value, channels: int, kept: int) -> ir.Value:
    """Return indices `[batch, kept, channels]` of a convolution's next state within its state and inputs."""
    counts = build("Unsqueeze", build("Cast", query, to=ir.DataType.INT64), [1])
    index = build("Unsqueeze", build("Add", counts, [*range(kept)]), [2])
    rows = build("Shape", query)
    return build("Expand", index, build("Concat", rows, [kept, channels], axis=0))


def keep_state_layout(model: ir.Model) -> PassResult[ir.Model]:
    """Let a model take and return states in its operators' layout, if its own has the last two axes swapped.

    Before: `y, next = LinearAttention(..., Transpose(past), ...); present = Transpose(next)`
    After:  `y, present = LinearAttention(..., past, ...)`, `past` and `present` of the other shape

    The state of a convolution with channels-last inputs and results becomes channels-last too (see `fast_state_forms`).

    The model's metadata name these states, since their shapes do not always tell.
    """
    for node in list(model.graph):
        if fits_convolution(node):
            _turn_state(model.graph, node)
    outputs = {str(value.name): value for value in model.graph.outputs}
    changed: list[str] = []
    for slot, past in past_slots(model.graph.inputs).items():
        read, given = _after(past), _before(outputs[slot.present])
        if slot.kind.grows is None and read is not None and given is not None:
            past.shape = read.shape
            read.replace_all_uses_with(past)
            given.name, given.shape = slot.present, read.shape
            model.graph.outputs[model.graph.outputs.index(outputs[slot.present])] = given
            outputs[slot.present].name = None
            changed.append(slot.past.removeprefix(PAST_PREFIX))
    if changed:
        model.metadata_props[TRANSPOSED_STATES] = " ".join(changed)
    return PassResult(len(changed))


def _turn_state(graph: ir.Graph, node: ir.Node) -> None:
    """Insert two transposes before and two after an operator's state, so that either pair can be separated.

    Before: `y, present = CausalConvWithState(x, weight, bias, past)`
    After:  `y, next = CausalConvWithState(x, weight, bias, T(T(past)))`, `present = T(T(next))`
    """
    past, present = node.inputs[STATE], node.outputs[1]
    if past is None or not past.is_graph_input() or len(_readers(past)) != 1 or not present.is_graph_output():
        return
    for value in (past, present):
        build = Builder(graph)
        turned = build("Transpose", value, perm=[0, 2, 1])
        back = build("Transpose", turned, perm=[0, 2, 1])
        if value.shape is not None:
            turned.shape, turned.type = ir.Shape([value.shape[axis] for axis in (0, 2, 1)]), value.type
        if value is past:
            back.shape, back.type = value.shape, value.type
            node.replace_input_with(STATE, back)
            build.insert_before(node)
        else:
            replace_readers(value, back, build.take())


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return the readers of a state, except those of its number of rows."""
    return [usage.node for usage in value.uses() if not takes_row_count(usage.node)]


def _after(value: ir.Value) -> ir.Value | None:
    """Return a value's transpose of the last two axes, if that is its only reader."""
    readers = _readers(value)
    if len(readers) != 1:
        return None
    (node,) = readers
    if _keeps_shape(node):
        return _after(node.outputs[0])
    return node.outputs[0] if swaps_last_axes(node) else None


def _before(value: ir.Value) -> ir.Value | None:
    """Return the value whose transpose of the last two axes this is."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None
    if _keeps_shape(node):
        return _before(node.inputs[0])
    return node.inputs[0] if swaps_last_axes(node) else None


def _keeps_shape(node: ir.Node) -> bool:
    """Return whether a node is a reshape to the same shape, all sizes known except the batch's."""
    shapes = [v.shape for v in (node.inputs[0], node.outputs[0]) if v is not None and v.shape is not None]
    if node.op_type != "Reshape" or len(shapes) != 2 or len(shapes[0]) != len(shapes[1]):
        return False
    one, other = (tuple(shape)[1:] for shape in shapes)
    return one == other and all(isinstance(size, int) for size in one)
