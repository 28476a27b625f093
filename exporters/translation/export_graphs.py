"""The graphs that an export starts from: PyTorch operators, in the export's precision."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx
from transformers import Cache

from gralora_fx.base.compat.torch_graphs import tree_info, tree_leaves, tree_unflatten
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.tracing.normalize.modes import find_rng_op, set_mode
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, first_line, listed, option, warn_caller
from gralora_fx.exporters.translation.retrace import spell_out
from gralora_fx.format.cache_slots import StateKind
from gralora_fx.format.input_names import PAST
from gralora_fx.format.size_limits import SizeLimit, holds, sizes_in
from gralora_fx.run.engine.limits import context_length

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_exportable(traced: TracedModel, *, verify: bool) -> None:
    """Check that a trace can be exported."""
    if not traced.example_inputs:
        raise ExportError("the trace has no example inputs, which the export needs; give them to trace()")
    (output,) = traced.graph_module.graph.find_nodes(op="output")
    if not output.all_input_nodes:
        raise ExportError("the model returns no tensor, so there is nothing to export; return one from its forward")
    numbers = [str(node) for node in output.all_input_nodes if not _is_tensor(node)]
    if numbers:
        warn_caller(f"the model returns numbers beside tensors ({', '.join(numbers)}), which the export leaves out")
    ends = [*traced.graph_module.graph.find_nodes(op="placeholder"), *output.all_input_nodes]
    values = [(node, node.meta["val"]) for node in ends if isinstance(node.meta.get("val"), torch.Tensor)]
    if found := [str(node) for node, value in values if value.is_complex()]:
        raise ExportError(
            f"the model takes or returns complex numbers ({listed(found)}), which ONNX Runtime does not; take and "
            "return their parts instead (torch.view_as_real)"
        )
    graph = copy_graph(traced.graph_module)
    set_mode(graph, False)
    if verify and (drawn := find_rng_op(graph)) is not None:
        raise ExportError(
            f"the model draws random numbers in evaluation ({drawn}), so no two runs agree and none can be verified; "
            f"make the noise an input of its forward, or export with {option(verify=False)}"
        )
    beyond = [limit for limit in traced.signature.limits if not _holds_in_context(limit, traced)]
    if PAST in traced.example_inputs and beyond:  # steps are as long as their rows' prompts need
        raise ExportError(
            f"the model takes {beyond[0]}, which the steps of a decoder do not keep to; trace it for a task without a "
            "cache"
        )
    precision_of(traced.graph_module)


def _holds_in_context(limit: SizeLimit, traced: TracedModel) -> bool:
    """Return whether a limit is a greatest length, beyond the longest that the model has positions for."""
    config = {} if traced.config is None else traced.config.get_text_config().to_dict()
    longest = {path: context_length(config, path) for path, _ in sizes_in(limit.test)}
    if limit.test[0] != "<=" or not isinstance(limit.test[2], int) or None in longest.values():
        return False
    return holds(limit.test, {path: (1, size or 0) for path, size in longest.items()})


def _is_tensor(node: fx.Node) -> bool:
    """Return whether a node is a tensor, by its traced value."""
    return "val" not in node.meta or isinstance(node.meta["val"], torch.Tensor)


def graph_to_translate(traced: TracedModel) -> fx.GraphModule:
    """Return a copy of a trace's graph in evaluation mode, of PyTorch operators, each with its traced value."""
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module))
    set_mode(graph_module.graph, False)
    if any(isinstance(node.target, FunctionType) for node in graph_module.graph.nodes):  # such as functions of regions
        from gralora_fx.core.tracing.normalize.regions import drop_regions_for_inference

        drop_regions_for_inference(graph_module.graph)
    graph_module.train(False)
    is_noted = all("val" in node.meta for node in graph_module.graph.find_nodes(op="placeholder"))  # pickle drops it
    if is_noted:
        spell_out(graph_module.graph)
    if traced.example_inputs.get(PAST) is not None and is_noted:
        return graph_module
    return _as_operators(graph_module, traced)


def step_to_translate(traced: TracedModel) -> fx.GraphModule:
    """Return the graph of a decoder's step, which returns only logits and the cache."""
    graph_module = graph_to_translate(traced)
    output = graph_module.graph.output_node()
    results: Any = output.args[0]
    named = tree_unflatten(results, tree_info(graph_module.graph).out_spec)
    others = [value for name, value in named.items() if name != "logits" and not isinstance(value, Cache)]
    beside = {node for node in tree_leaves(others) if isinstance(node, fx.Node)}
    if not beside:
        return graph_module
    output.args = (tuple(node for node in results if node not in beside),)
    graph_module.graph.set_codegen(fx.graph.CodeGen())  # the outputs no longer match its spec
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _as_operators(graph_module: fx.GraphModule, traced: TracedModel) -> fx.GraphModule:
    """Return the graph if it can be translated, else capture it again, such as a symbolic trace that calls modules."""
    from gralora_fx.core.tracing.ready_graphs import is_operator_graph, recapture

    if is_operator_graph(graph_module.graph):
        return graph_module
    try:
        return recapture(graph_module, traced.graph_inputs, dynamic=traced.signature.dynamic)
    except Exception as error:  # torch.export raises errors of every type
        raise ExportError(f"the graph cannot be captured as PyTorch's operators: {first_line(error)}") from error


@dataclass(frozen=True)
class CastGraph:
    """Cast a graph's weights and activations to a precision; unchanged if all are float32 and stay so.

    Before: `x: float32; h = to(x, float32); y = to(h * rsqrt(mean(h * h)), float32) * w`
    After:  `x: float16; h = to(x, float32); y = to(h * rsqrt(mean(h * h)), float16) * w`, `w` cast when it is read

    The graph's own casts to float32 stay, though they change nothing in a float32 graph. Weights are cast from their
    sources, so a folded weight is rounded once. Outputs are float32 except a cache's (`float32_inputs` does the same
    for inputs); a state that sums up a text stays in float32 from step to step.
    """

    precision: str  # `"fp32"`, `"fp16"` or `"bf16"`
    # kinds of its cache's tensors: the last inputs, and the outputs from the second on
    cache: tuple[StateKind, ...] = ()

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Return a graph with new parameters, on the meta device until they are read."""
        graph_module = graph.owning_module
        assert graph_module is not None
        before = precision_of(graph_module)
        if {self.precision, before} == {"fp32"}:
            return PassResult(0)
        from gralora_fx.exporters.translation.cast_graph import GraphCast

        change = GraphCast(graph_module, DTYPES[before], DTYPES[self.precision], self.cache)
        changed = change.run()
        return PassResult(len(change.kinds), graph=changed.graph)


def cast_graph(graph_module: fx.GraphModule, precision: str) -> fx.GraphModule:
    """Return a model's graph in a precision, itself if it has that (see `CastGraph`); it takes inputs of any."""
    graph = CastGraph(precision)(graph_module.graph).graph
    if graph is None:
        return graph_module
    from gralora_fx.exporters.translation.cast_graph import cast_inputs

    return cast_inputs(graph, DTYPES[precision])


def precision_of(graph_module: fx.GraphModule) -> str:
    """Return the precision of a graph's float parameters: `fp32` if it has none, the half precision if some have one.

    An export casts all of them to its own precision, where each is read.
    """
    dtypes = {p.dtype for p in graph_module.parameters() if p.is_floating_point()}
    if not dtypes <= {*DTYPES.values()}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ExportError(f"the model holds {names} weights; cast it to one of float32, float16, bfloat16 and trace")
    return next((name for name, dtype in reversed(DTYPES.items()) if dtype in dtypes), "fp32")
