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
    """The ONNX forms of PyTorch's operators for a version of ONNX's, by onnxscript's torchlib."""
    return _registration.ONNXRegistry.from_torchlib(opset_version=opset)


def operators_in(registry: Any) -> set[Any]:
    """The operators that a registry has an ONNX form of."""
    return set(_decomp.get_onnx_implemented_overloads(registry))


def decomposition_table(kept: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions of operators, without those of the ones that are kept."""
    return dict(_decomp.create_onnx_friendly_decomposition_table(set(kept)))


def promote_types(module: fx.GraphModule) -> None:
    """Make casts that PyTorch's operators do by themselves explicit; in place. It runs the graph on fake tensors."""
    _fx_passes.insert_type_promotion_nodes(module)


def translate_graph(
    graph: fx.Graph, model: ir.Model, into: ir.Graph | ir.Function, functions: Mapping[str, ir.Function], registry: Any
) -> None:
    """Translate a graph, node for node.

    Args:
        graph: A graph of PyTorch's operators, every node with its fake value.
        model: The model that it becomes a part of.
        into: The graph or the function that gets the nodes.
        functions: Functions of the model by the name of the subgraph that each was made of.
        registry: What `new_registry` gave.
    """
    options: dict[str, Any] = {"graph_like": into, "owned_graphs": functions, "lower": "at_conversion"}
    _core._translate_fx_graph(graph, model, registry=registry, **options)


def add_opset_imports(model: ir.Model) -> None:
    """Import the domains of all operators of a model; in place."""
    _ir_passes.add_opset_imports(model)


def current_builder() -> Any:
    """What a translation that runs adds nodes with."""
    return _core.current_tracer
