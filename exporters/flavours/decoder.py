"""A decoder with a cache as one ONNX graph for prompts and for single steps."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer
from torch import fx

from gralora_fx.errors import ExportError
from gralora_fx.exporters.fx_passes.broadcast_attention import mark_shared_heads
from gralora_fx.exporters.fx_passes.matching import END
from gralora_fx.exporters.fx_passes.operators import DOMAIN
from gralora_fx.exporters.onnx_passes.builder import Builder
from gralora_fx.exporters.onnx_passes.fuse_attention import fuse_attention
from gralora_fx.exporters.onnx_passes.merge_matmuls import join_products
from gralora_fx.exporters.onnx_passes.normalization import lower_norms, mark_rms_norms
from gralora_fx.exporters.onnx_passes.rotary import RotaryTables, lower_rotary, mark_rotary
from gralora_fx.exporters.reports import AttentionReport
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import Turned, unless_weight
from gralora_fx.progress.silence import quiet

# operators between the last projection and the logits that a model may have, such as a soft cap or a factor
_ELEMENTWISE = {"Mul", "Div", "Add", "Tanh", "Cast", "Identity", "Clip"}


def decoder_model(graph_module: fx.GraphModule, *, logits: str) -> tuple[ir.Model, AttentionReport]:
    """The ONNX model of a traced decoder step.

    Before: `logits, keys and values = forward(input_ids, attention_mask, position_ids, past keys and values)`
    After:  the same with `past_key_values.N.key|value` in and `present.N.key|value` out, attention fused, and logits of
            the last position only unless all are asked for

    Args:
        graph_module: A graph traced with a cache, without adapters, in evaluation mode.
        logits: `"last"` or `"all"`.

    Returns:
        The model, and which layers' attention is fused.

    Raises:
        ExportError: The graph has no ONNX form.
    """
    model = translate(graph_module, mark_rms_norms, mark_rotary, mark_shared_heads)
    store_as_used(model)
    tables = RotaryTables(model.graph)
    attention = fuse_attention(model, tables)
    lower_rotary(model, tables)
    _name_cache(model)
    if logits == "last":
        _keep_last_position(model)
    lower_norms(model)
    optimizer.remove_unused_nodes(model)
    join_products(model)
    model.graph.opset_imports.pop(DOMAIN, None)
    with quiet():  # it says what it leaves
        optimizer.fold_constants(model, should_fold=unless_weight)
    optimizer.remove_unused_nodes(model)
    return model, attention


def store_as_used(model: ir.Model) -> None:
    """Store weights that are only read transposed the way they are used.

    Before: `y = MatMul(x, Transpose(w))`
    After:  `y = MatMul(x, w)`, with `w` stored `[in, out]`

    A weight that something else reads too, such as a tied embedding, stays as it is: it is stored once.

    Args:
        model: The model; it is changed in place.
    """
    for value in list(model.graph.initializers.values()):
        users = [usage.node for usage in value.uses()]
        tensor = value.const_value
        is_matrix = tensor is not None and len(tensor.shape) == 2
        if not is_matrix or len(users) != 1 or not _transposes(users[0]) or value.is_graph_output():
            continue
        (node,) = users
        turned = node.outputs[0]
        assert tensor is not None
        value.const_value = Turned(value.name, tensor)
        value.shape = value.const_value.shape
        ir.convenience.replace_all_uses_with(turned, value)
        model.graph.remove(node, safe=True)


def _transposes(node: ir.Node) -> bool:
    """Whether a node transposes a matrix: one that keeps the order of its axes does not."""
    order = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return node.op_type == "Transpose" and (order is None or list(order.as_ints()) == [1, 0])


def _name_cache(model: ir.Model) -> None:
    """Give inputs and outputs the ecosystem's names."""
    pasts = [value for value in model.graph.inputs if str(value.name).startswith("past_key_values")]
    logits, *presents = model.graph.outputs
    if len(pasts) != len(presents) or len(pasts) % 2:
        raise ExportError(f"the trace takes {len(pasts)} cached tensors and returns {len(presents)}; trace it again")
    logits.name = "logits"
    for index, (past, present) in enumerate(zip(pasts, presents, strict=True)):
        part = f"{index // 2}.{'value' if index % 2 else 'key'}"
        past.name, present.name = f"past_key_values.{part}", f"present.{part}"


def _keep_last_position(model: ir.Model) -> None:
    """Compute logits for the last position of each row only, the last that is no padding: a prompt needs no others."""
    logits = model.graph.outputs[0]
    value, chain = logits, [logits]
    node = value.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        varying = [v for v in node.inputs if v is not None and v.producer() is not None and v.const_value is None]
        if len(varying) != 1:
            varying = [v for v in varying if v.shape is not None and len(v.shape) == 3]
        if len(varying) != 1:
            break
        value, node = varying[0], varying[0].producer()
        chain.append(value)
    if node is None or node.op_type not in ("MatMul", "Gemm") or node.inputs[0] is None:
        raise ExportError(
            "no projection leads to the logits, so the last position cannot be cut out; take logits='all'"
        )
    hidden = node.inputs[0]
    ids, mask = (_input(model, name) for name in ("input_ids", "attention_mask"))
    build = Builder(model.graph)
    length = build("Shape", ids, start=1, end=2)
    window = build("Slice", mask, build("Neg", length), build.ints(END), build.ints(1))  # the mask of new positions
    last = build("ArgMax", window, axis=1, keepdims=1, select_last_index=1)  # [batch, 1]
    cut = build("GatherND", hidden, build("Unsqueeze", last, build.ints(2)), batch_dims=1)  # [batch, 1, size]
    if hidden.shape is not None:
        cut.shape = ir.Shape([hidden.shape[0], 1, *hidden.shape[2:]])
    cut.type = hidden.type
    build.insert_before(node)
    node.replace_input_with(0, cut)
    for member in chain:
        if member.shape is not None and len(member.shape) == 3:
            member.shape = ir.Shape([member.shape[0], 1, member.shape[2]])


def _input(model: ir.Model, name: str) -> ir.Value:
    found = next((value for value in model.graph.inputs if value.name == name), None)
    if found is None:
        raise ExportError(f"the trace takes no {name}, so the last position cannot be cut out; take logits='all'")
    return found
