"""States in the layout of the operators that keep them, so that no step transposes them."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.builder import Builder, replace_readers, swaps_last_axes, takes_row_count
from gralora_fx.features.states.forms import fits_convolution
from gralora_fx.features.states.rows import STATE
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.export_directory import TRANSPOSED_STATES
from gralora_fx.format.input_names import PAST_PREFIX


def keep_state_layout(model: ir.Model) -> PassResult[ir.Model]:
    """Let a model take and give states as its operators do, where the model itself has their last two axes swapped.

    Before: `y, next = LinearAttention(..., Transpose(past), ...); present = Transpose(next)`
    After:  `y, present = LinearAttention(..., past, ...)`, `past` and `present` of the other shape

    Likewise the state of a convolution whose inputs and results have their channels last: the state has them last too
    (see `fast_state_forms`).

    The model's metadata name them, since their shapes do not always tell.
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
    """Transpose a state of the cache twice before an operator and twice behind it, so that either pair can be parted.

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
    """What reads a state, but for its number of rows."""
    return [usage.node for usage in value.uses() if not takes_row_count(usage.node)]


def _after(value: ir.Value) -> ir.Value | None:
    """The value with its last two axes swapped, where that is all that is read of it."""
    readers = _readers(value)
    if len(readers) != 1:
        return None
    (node,) = readers
    if _keeps_shape(node):
        return _after(node.outputs[0])
    return node.outputs[0] if swaps_last_axes(node) else None


def _before(value: ir.Value) -> ir.Value | None:
    """The value of which it is the one with the last two axes swapped."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None
    if _keeps_shape(node):
        return _before(node.inputs[0])
    return node.inputs[0] if swaps_last_axes(node) else None


def _keeps_shape(node: ir.Node) -> bool:
    """Whether a node gives a value of the same shape: a reshape whose sizes, but for that of the batch, are known."""
    shapes = [v.shape for v in (node.inputs[0], node.outputs[0]) if v is not None and v.shape is not None]
    if node.op_type != "Reshape" or len(shapes) != 2 or len(shapes[0]) != len(shapes[1]):
        return False
    one, other = (tuple(shape)[1:] for shape in shapes)
    return one == other and all(isinstance(size, int) for size in one)
