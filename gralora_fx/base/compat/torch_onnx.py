"""`torch.onnx`'s translation of operators, without its tracing and passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx_ir as ir
from torch import fx

from gralora_fx.base.compat.packages import fenced

with fenced("torch"):
    from torch.onnx._internal.exporter import _core, _decomp, _ir_passes, _registration
    from torch.onnx._internal.fx.passes import type_promotion


def new_registry(opset: int) -> Any:
    """Return onnxscript torchlib's translations of PyTorch operators for an opset version."""
    return _registration.ONNXRegistry.from_torchlib(opset_version=opset)


def operators_in(registry: Any) -> set[Any]:
    """Return the operators that a registry can translate."""
    return set(_decomp.get_onnx_implemented_overloads(registry))


def decomposition_table(supported: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """Return PyTorch's decompositions, except those of supported operators."""
    return dict(_decomp.create_onnx_friendly_decomposition_table(set(supported)))


def promote_types(module: fx.GraphModule) -> None:
    """Make implicit type promotion explicit; in place. Only calls that change are run on fake tensors."""
    for graph in module.modules():
        assert isinstance(graph, fx.GraphModule)
        promotion = type_promotion.InsertTypePromotion(graph)
        promotion.interpreter = _Promotion(graph, promotion.interpreter.type_promotion_table)
        promotion.run()


class _Promotion(type_promotion._TypePromotionInterpreter):
    """torch's promotion of each call, with the noted values of calls that stay as they are."""

    def run_node(self, node: fx.Node) -> Any:
        """Promote a call's arguments; return its value."""
        if node.op != "call_function" or "val" not in node.meta:
            return super().run_node(node)
        with self._set_current_node(node):
            if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]


def translate_graph(
    graph: fx.Graph, model: ir.Model, into: ir.Graph | ir.Function, functions: Mapping[str, ir.Function], registry: Any
) -> None:
    """Translate a graph, node for node.

    Tensors that the graph reads become initializers of an ONNX graph, or `Constant` nodes of a function, named like the
    nodes that read them. They are passed to `torch.onnx` as inputs, because torch 2.11 translates no `get_attr` nodes.
    """
    tensors = {node.name: node for node in graph.find_nodes(op="get_attr") if node.target not in functions}
    for node in tensors.values():
        node.op = "placeholder"
    options: dict[str, Any] = {"graph_like": into, "owned_graphs": functions, "lower": "at_conversion"}
    _core._translate_fx_graph(graph, model, registry=registry, **options)
    for value in [value for value in into.inputs if value.name in tensors]:
        into.inputs.remove(value)
        value.const_value = _core.TorchTensor(tensors[str(value.name)].meta["val"], name=value.name)
        if isinstance(into, ir.Graph):
            into.register_initializer(value)
        else:  # a function reads nothing from outside
            _prepend(into, ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], outputs=[value]))


def _prepend(function: ir.Function, node: ir.Node) -> None:
    if len(function):
        function.insert_before(function[0], node)
    else:
        function.append(node)


def add_opset_imports(model: ir.Model) -> None:
    """Import the domains of all operators of a model; in place."""
    _ir_passes.add_opset_imports(model)


def current_builder() -> Any:
    """Return the builder that the running translation adds nodes to."""
    return _core.current_tracer
