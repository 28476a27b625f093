"""Recapture of graphs traced by other means or with fixed sizes, as PyTorch's own operators."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from gralora_fx.compat.torch_graphs import HigherOrderOperator, OpOverload
from gralora_fx.graph.pipeline import PassLog
from gralora_fx.progress.stages import quiet
from gralora_fx.tracing.capture import dynamic_axes
from gralora_fx.tracing.draft import Axes
from gralora_fx.tracing.normalize.stage import CLEANING, normalized
from gralora_fx.tracing.patches.meta_parameters import placeholder_parameters, restore_parameters

_CONTROL_FLOW = {"cond", "scan"}  # control flow with an ONNX form
_SCALARS = {"_operator", "math", "torch"}  # modules of the functions that compute sizes
_PREFIX = "graph_module."


def is_operator_graph(graph: fx.Graph) -> bool:
    """Whether a graph consists of PyTorch's operators with traced values, and has dynamic axes.

    Args:
        graph: Any graph.
    """
    nodes = list(graph.nodes)
    inputs = [value for node in nodes if node.op == "placeholder" and isinstance(value := node.meta.get("val"), Tensor)]
    varies = any(isinstance(size, torch.SymInt) for value in inputs for size in value.shape)
    return varies and all(_is_known(node) for node in nodes)


def _is_known(node: fx.Node) -> bool:
    if node.op in ("get_attr", "output"):
        return True
    if node.op == "placeholder":
        return "val" in node.meta or not node.users
    if node.op != "call_function" or "val" not in node.meta:
        return False
    if isinstance(node.target, HigherOrderOperator):
        return str(node.target) in _CONTROL_FLOW
    module = getattr(node.target, "__module__", "")
    return isinstance(node.target, OpOverload) or node.target is operator.getitem or module in _SCALARS


def recapture(graph_module: fx.GraphModule, inputs: Mapping[str, Any], *, dynamic: bool = True) -> fx.GraphModule:
    """Capture a graph anew by running it, with dynamic axes where possible.

    Before: `x = input.flatten(1); y = self.act(torch.nn.functional.linear(x, w))`
    After:  `x = aten.flatten(input, 1); y = aten.relu(aten.linear(x, w))`

    Args:
        graph_module: Any graph in evaluation mode; its parameters may be on the meta device.
        inputs: Its inputs by name.
        dynamic: Whether axes may vary; False for a trace with fixed sizes.

    Returns:
        A graph over the same parameters, under their own names.
    """
    graph_module.recompile()
    with placeholder_parameters(graph_module) as originals, quiet(), torch.no_grad():
        wrapper, shapes = _Named(graph_module, inputs), dynamic_axes(inputs, Axes.SEQUENCES if dynamic else Axes.NONE)
        program = torch.export.export(wrapper, (), dict(inputs), dynamic_shapes=shapes, strict=False)
        captured = normalized(program.run_decompositions({}).module(check_guards=False), CLEANING, PassLog())
    restore_parameters(captured, originals)
    for node in captured.graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target).startswith(_PREFIX):
            node.target = str(node.target).removeprefix(_PREFIX)
    modules = {name: module for name, module in captured.named_children() if f"{name}." != _PREFIX}
    inner = captured.get_submodule(_PREFIX[:-1]) if hasattr(captured, _PREFIX[:-1]) else nn.Module()
    for name, module in modules.items():
        inner.add_module(name, module)
    return fx.GraphModule(inner, captured.graph)


class _Named(nn.Module):
    """A graph as a module whose signature names its inputs, which `torch.export` needs for dynamic shapes."""

    def __init__(self, graph_module: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__()
        self.graph_module = graph_module
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

        def forward(**inputs: Any) -> Any:
            return self.graph_module(**inputs)

        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward
