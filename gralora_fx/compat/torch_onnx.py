"""The translation of operators within `torch.onnx`, without the trace and the passes around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx_ir as ir
from torch import fx

from gralora_fx.compat.versions import fenced

with fenced("torch"):
    from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _ir_passes, _registration


def new_registry(opset: int) -> Any:
    """The translations of PyTorch's operators for an opset version, from onnxscript's torchlib."""
    return _registration.ONNXRegistry.from_torchlib(opset_version=opset)


def operators_in(registry: Any) -> set[Any]:
    """The operators that a registry can translate."""
    return set(_decomp.get_onnx_implemented_overloads(registry))


def decomposition_table(supported: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions, except those of supported operators."""
    return dict(_decomp.create_onnx_friendly_decomposition_table(set(supported)))


def promote_types(module: fx.GraphModule) -> None:
    """Make implicit type promotion explicit; in place. It runs the graph on fake tensors."""
    _fx_passes.insert_type_promotion_nodes(module)


def translate_graph(
    graph: fx.Graph, model: ir.Model, into: ir.Graph | ir.Function, functions: Mapping[str, ir.Function], registry: Any
) -> None:
    """Translate a graph, node for node.

    Args:
        graph: A graph of PyTorch's operators, every node with its fake value.
        model: The model that the result is part of.
        into: The graph or function that receives the nodes.
        functions: Functions of the model by the name of the subgraph that each was translated from.
        registry: The result of `new_registry`.
    """
    options: dict[str, Any] = {"graph_like": into, "owned_graphs": functions, "lower": "at_conversion"}
    _core._translate_fx_graph(graph, model, registry=registry, **options)


def add_opset_imports(model: ir.Model) -> None:
    """Import the domains of all operators of a model; in place."""
    _ir_passes.add_opset_imports(model)


def current_builder() -> Any:
    """The builder that the running translation adds nodes to."""
    return _core.current_tracer
