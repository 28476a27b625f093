"""Final forms of layers with a state: faster ones on a CPU, and clamps that apply to prompts only.

They come last, so that earlier passes see the operators. Clamps are those of Mamba2's time steps in transformers (see
`PromptClamp`).
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult, Skip
from gralora_fx.exporters.rules.branches import named_graph
from gralora_fx.exporters.rules.builder import MICROSOFT, Builder, replace_value, static_dim
from gralora_fx.exporters.rules.rows.row_tokens import RowTokens
from gralora_fx.exporters.translation.names import layer_of
from gralora_fx.features.states.lowering import PromptClampNode
from gralora_fx.format.export_directory import TOKENS_APART


def lower_prompt_clamps(model: ir.Model) -> PassResult[ir.Model]:
    """Clamp numbers if there are several tokens, or no state before them.

    Before: `y = PromptClamp(x, state)`
    After:  `y = Where(Or(Shape(x)[1] > 1, ReduceL1(state) == 0), Clip(x), x)`, recorded in the metadata
    """
    changed = 0
    for node, taken in PromptClampNode.all_in(model.graph):
        build = Builder(model.graph)
        count = build.size(taken.x, 1)
        rank = len(taken.state.shape or ())
        sums = build("ReduceL1", taken.state, [*range(1, rank)], keepdims=0)
        is_new = build("Equal", sums, build.tensor(0.0, taken.state.dtype or ir.DataType.FLOAT))
        is_prompt = build("Or", is_new, build("Greater", count, 1))
        _clamp(build, node, taken, build("Unsqueeze", is_prompt, [1, 2]))
        changed += 1
    if changed:
        model.metadata_props[TOKENS_APART] = "1"
    return PassResult(changed)


def clamp_rows(model: ir.Model, tokens: RowTokens) -> None:
    """Lower clamps of a graph with row lengths: they apply where a row reads several tokens, or its first."""
    is_prompt: ir.Value | None = None
    for node, taken in PromptClampNode.all_in(model.graph):
        build = Builder(model.graph)
        if is_prompt is None:
            zero, one = (build.tensor(number, ir.DataType.INT32) for number in (0, 1))
            of_row = build("Or", build("Greater", tokens.query, one), build("Equal", tokens.cached, zero))
            by_place = build("And", tokens.is_read(build), build("Unsqueeze", of_row, [1, 2]))
            is_prompt = tokens.of_rows(build, by_place)  # [1, tokens, 1]
            model.metadata_props[TOKENS_APART] = "1"
        _clamp(build, node, taken, is_prompt)


def _clamp(build: Builder, node: ir.Node, taken: PromptClampNode, is_prompt: ir.Value) -> None:
    dtype = taken.x.dtype or ir.DataType.FLOAT
    limits = (build.tensor(limit, dtype) for limit in (taken.least, taken.largest))
    y = build("Where", is_prompt, build("Clip", taken.x, *limits), taken.x)
    y.shape, y.type = taken.x.shape, taken.x.type
    replace_value(y, node.outputs[0])
    build.insert_before(node)
    build.graph.remove(node, safe=True)


_BLOCK = 16  # channels that ONNX Runtime's convolution computes at once; it has no fast form for a remainder


def fast_state_forms(model: ir.Model) -> PassResult[ir.Model]:
    """Replace operators with a state by forms that ONNX Runtime computes faster, if there are any.

    Before: `y, next = CausalConvWithState(Transpose(x), weight, bias, state)`, a third of the speed of a convolution
    After:  `y = Conv(Concat(state, x), weight, bias)` and `next`, the end of the concatenation

    Before: `y, next = LinearAttention(query, key, value, state, decay)` of single numbers with a decay for each key
    After:  `next, y = Scan(state, query, key, value, decay)`, one step for each position
    """
    changed, scans = 0, []
    for node in list(model.graph):
        replace = _FORMS.get(node.op_type) if node.domain == MICROSOFT else None
        build = Builder(model.graph)
        if replace is None or not replace(build, node):
            continue
        if node.op_type == "LinearAttention":
            why = "a Scan: LinearAttention takes four times as long for values that are single numbers"
            scans.append(Skip(layer_of(node), why))
        build.insert_before(node)
        model.graph.remove(node, safe=True)
        changed += 1
    return PassResult(changed, tuple(scans))


def _convolve(build: Builder, node: ir.Node) -> bool:
    """Build a convolution with channels last, like the layers around it; return False if it does not fit."""
    x, weight, bias, state = (*node.inputs, None, None)[:4]
    width = static_dim(weight, 2)
    if not fits_convolution(node) or x is None or weight is None or state is None or width is None:
        return False
    kept, parts = build.ints(2), [channels_last(build, value) for value in (state, x)]
    known = [usage.node for usage in parts[0].uses() if usage.node.op_type == "Concat"]
    known = [concat for concat in known if list(concat.inputs) == parts]  # for the next state of rows
    joined = known[0].outputs[0] if known else build("Concat", *parts, axis=1)
    rows = build("Transpose", build("Unsqueeze", joined, kept), perm=[0, 3, 1, 2])  # [batch, channels, positions, 1]
    y = build("Conv", rows, build("Unsqueeze", weight, [3]), bias, group=static_dim(weight, 0))
    y = build("Squeeze", build("Transpose", y, perm=[0, 2, 3, 1]), kept)
    if node.attributes["activation"].as_string() == "silu":
        y = build("QuickGelu", y, domain=MICROSOFT, alpha=1.0)
    last = build("Slice", joined, [1 - width], [1 << 62], [1])
    for new, old in ((y, node.outputs[0]), (last, node.outputs[1])):
        replace_channels_first(build, new, old)
    return True


def fits_convolution(node: ir.Node) -> bool:
    """Return whether a node is a causal convolution with a state, surrounded by channels-last layers."""
    if node.domain != MICROSOFT or node.op_type != "CausalConvWithState":
        return False
    x, weight, _, state = (*node.inputs, None, None)[:4]
    readers = [usage.node for usage in node.outputs[0].uses()]
    channels, width, producer = static_dim(weight, 0), static_dim(weight, 2), None if x is None else x.producer()
    if state is None or not channels or channels % _BLOCK or not width or node.outputs[0].is_graph_output():
        return False
    return producer is not None and bool(readers) and all(map(swaps_last_axes, [producer, *readers]))


def _scan(build: Builder, node: ir.Node) -> bool:
    """Build a Scan over positions for linear attention of single numbers; return False for any other."""
    query, key, value, state, decay, beta = (*node.inputs, None, None)[:6]
    heads, groups = (node.attributes[name].as_int() for name in ("kv_num_heads", "q_num_heads"))
    size = static_dim(state, 2)
    if beta is not None or query is None or state is None or size is None or static_dim(state, 3) != 1:
        return False
    if heads % groups or static_dim(decay, 2) != heads * size or static_dim(key, 2) != groups * size:
        return False
    dtype = query.dtype or ir.DataType.FLOAT
    apart = [0, groups, heads // groups, size]
    carried = ir.Value(name="before", type=ir.TensorType(dtype))
    names = ("query", "key", "value", "decay")
    parts = {name: ir.Value(name=f"{name}_here", type=ir.TensorType(dtype)) for name in names}
    inner = Builder(build.graph)
    factor = inner("Exp", inner("Reshape", parts["decay"], [*apart]))
    written = inner(
        "Mul", inner("Reshape", parts["value"], [*apart[:3], 1]), inner("Reshape", parts["key"], [0, groups, 1, size])
    )
    after = inner("Add", inner("Mul", carried, factor), written)
    y = inner("MatMul", after, inner("Reshape", parts["query"], [0, groups, size, 1]))
    scale = node.attributes["scale"].as_float()
    y = y if scale == 1.0 else inner("Mul", y, inner.tensor(scale, dtype))
    y = inner("Reshape", y, [0, heads])
    for output in (after, y):
        output.type = ir.TensorType(dtype)
    body = named_graph([carried, *parts.values()], [after, y], inner.take(), "scan")
    loop = build.node(
        "Scan",
        [build("Reshape", state, [*apart]), query, key, value, decay],
        num_outputs=2,
        body=body,
        num_scan_inputs=len(names),
        scan_input_axes=[1] * len(names),
        scan_output_axes=[1],
    )
    replace_value(build("Reshape", loop.outputs[0], [0, heads, size, 1]), node.outputs[1])
    replace_value(loop.outputs[1], node.outputs[0])
    return True


_FORMS: dict[str, Callable[[Builder, ir.Node], bool]] = {"CausalConvWithState": _convolve, "LinearAttention": _scan}
FORM_PASSES = (lower_prompt_clamps, fast_state_forms)


def channels_last(build: Builder, value: ir.Value) -> ir.Value:
    """Return a value `[batch, channels, length]` channels last: the source of its transpose, or a new transpose."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and swaps_last_axes(producer) else None
    return build("Transpose", value, perm=[0, 2, 1]) if source is None else source


def replace_channels_first(build: Builder, new: ir.Value, old: ir.Value) -> None:
    """Replace all uses of `[batch, channels, length]` by `[batch, length, channels]`, dropping transposes of it."""
    for usage in list(old.uses()):
        if swaps_last_axes(usage.node):
            replace_value(new, usage.node.outputs[0])
            build.graph.remove(usage.node, safe=True)
    if old.uses() or old.is_graph_output():
        replace_value(build("Transpose", new, perm=[0, 2, 1]), old)


def swaps_last_axes(node: ir.Node) -> bool:
    """Return whether a node transposes exactly the last two axes of its input."""
    if node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    axes = list(node.attributes["perm"].as_ints())
    rank = len(axes)
    return rank > 1 and axes == [*range(rank - 2), rank - 1, rank - 2]
