"""Outputs of linear layers that adapters scale: the output without the layer's bias, and which adapter scales what."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.rules.adapters.adapter_groups import Grouping, is_tokens
from gralora_fx.exporters.rules.builder import Builder, input_at
from gralora_fx.exporters.rules.rows.flatten_tokens import FlatTokens
from gralora_fx.exporters.rules.rows.token_groups import ids_of_tokens
from gralora_fx.format.export_directory import QUERY_SEQLENS


def without_bias(build: Builder, value: ir.Value) -> ir.Value:
    """Return the output of a linear layer without its bias, which is subtracted again.

    Leaving it out instead would undo ONNX Runtime's fusion of the bias with the product.
    """
    node = value.producer()
    bias = None
    if node is not None and node.op_type == "Gemm":
        bias = input_at(node, 2)
    elif node is not None and node.op_type == "Add":
        bias = next((v for v in node.inputs if v is not None and v.shape is not None and len(v.shape) == 1), None)
    return value if bias is None else build("Sub", value, bias)


def ids_of_outputs(grouping: Grouping, x: ir.Value) -> ir.Value:
    """Return the adapter of each row of a layer's output, in its axes before the features; built once for each form.

    A factor `[adapters, out]` gathered by them has the output's axes, or is broadcast to them.
    """
    assert x.shape is not None
    lead = tuple(map(str, x.shape[:-1]))
    if lead in grouping.ids_by_axes:
        return grouping.ids_by_axes[lead]
    graph = grouping.model.graph
    build = Builder(graph)
    inputs = {str(value.name): value for value in graph.inputs}
    flat: FlatTokens | None = grouping.model.meta.get(FlatTokens.META, {}).get(lead[0])
    if QUERY_SEQLENS in inputs and is_tokens(x):
        ids = ids_of_tokens(build, inputs["input_ids"], inputs[QUERY_SEQLENS], grouping.ids)
        if len(lead) == 1:
            ids = build("Squeeze", ids, [0])
    elif flat is not None:
        every = build("Expand", build("Unsqueeze", grouping.ids, [1]), flat.sizes)
        ids = build("Reshape", every, [-1])
        if flat.tokens is not None:
            ids = build("Gather", ids, flat.tokens, axis=0)
        build.insert_after(x)
    else:
        ids = grouping.ids if len(lead) == 1 else build("Unsqueeze", grouping.ids, [*range(1, len(lead))])
    if build.nodes:
        build.insert_after(grouping.ids)
    grouping.ids_by_axes[lead] = ids
    return ids
