"""A model without a cache as one ONNX graph of standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    OutputFixPass,
)
from onnxscript import optimizer
from torch import Tensor, fx

from gralora_fx.compat import pytree
from gralora_fx.compat.calling_convention import tree_info
from gralora_fx.compat.transformers_exporters import fix_model, leaf_names
from gralora_fx.exporters.flavours.decoder import store_as_used
from gralora_fx.exporters.translation.names import input_names, name_axes, name_outputs
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.progress.silence import quiet

OPSET = 20  # what runtimes other than ONNX Runtime read too


def plain_model(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> ir.Model:
    """The ONNX model of a traced graph without a cache.

    Args:
        graph_module: The graph, without adapters, in evaluation mode, every node with the value that tracing noted.
        inputs: The inputs it was traced with, by name.

    Raises:
        ExportError: The graph has no ONNX form.
    """
    graph_module, outputs = _with_flat_outputs(graph_module)
    model = translate(graph_module, opset=OPSET)
    store_as_used(model)
    with quiet():
        optimizer.fold_constants(model, should_fold=_may_fold)
    optimizer.remove_unused_nodes(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)  # it reads small ones alone
    CommonSubexpressionEliminationPass()(model)
    OutputFixPass()(model)
    _name(model, input_names(inputs), outputs)
    NameFixPass()(model)
    name_outputs(model)
    name_axes(model)
    fix_model(model)
    return model


def _may_fold(node: ir.Node) -> bool | None:
    """Whether constants may be folded at a node: not where a weight is transposed, nor where images are resized."""
    return False if node.op_type == "Resize" else unless_weight(node)


def _with_flat_outputs(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """A copy of a graph that returns nothing but tensors, one after the other, and their names."""
    graph = copy_graph(graph_module)
    output = graph.output_node()
    info = tree_info(graph)
    results: Any = output.args[0]
    if info is not None:
        results = pytree.tree_unflatten(results, info.out_spec)
    nodes: dict[int, fx.Node] = {}

    def token(value: Any) -> Any:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
            return None
        made = torch.empty(0)
        nodes[id(made)] = value
        tokens.append(made)
        return made

    tokens: list[Tensor] = []
    named = leaf_names(pytree.tree_map(token, results))
    output.args = (tuple(nodes[id(tensor)] for tensor in named.values()),)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and not isinstance(node.meta.get("val"), Tensor):
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(graph_module, graph), list(named)


def _name(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs their names; an output called as an input is, gets a prefix."""
    if len(inputs) == len(model.graph.inputs):
        for value, name in zip(model.graph.inputs, inputs, strict=True):
            value.name = name
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = f"output.{name}" if name in inputs else name
