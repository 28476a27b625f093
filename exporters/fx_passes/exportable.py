"""The graph that an export begins with: one that can be exported, copied, of PyTorch's operators."""

from __future__ import annotations

import torch
from torch import fx

from gralora_fx.errors import ExportError, first_line, warn_caller
from gralora_fx.exporters.fx_passes.cast_graph import precision_of
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.tracing.inputs.decoder_cache import PAST
from gralora_fx.tracing.normalize.modes import find_rng_op, set_mode
from gralora_fx.tracing.normalize.regions import drop_regions_for_inference
from gralora_fx.tracing.recapture import is_operator_graph, recapture
from gralora_fx.tracing.traced_model import TracedModel


def check_exportable(traced: TracedModel, *, verify: bool) -> None:
    """Check that a trace can be exported.

    Args:
        traced: The trace, with adapters folded.
        verify: Whether the export will be compared with it.

    Raises:
        ExportError: It has no example inputs, returns no tensor, draws random numbers though it is to be compared, or
            its weights are not of one precision that ONNX has.
    """
    if not traced.example_inputs:
        raise ExportError("the trace has no example inputs, which the export needs; give them to trace()")
    (output,) = traced.graph_module.graph.find_nodes(op="output")
    if not output.all_input_nodes:
        raise ExportError("the model returns no tensor, so there is nothing to export; return one from its forward")
    numbers = [str(node) for node in output.all_input_nodes if not _is_tensor(node)]
    if numbers:
        warn_caller(f"the model returns numbers beside tensors ({', '.join(numbers)}), which the export leaves out")
    graph = copy_graph(traced.graph_module)
    set_mode(graph, False)
    if verify and (drawn := find_rng_op(graph)) is not None:
        raise ExportError(
            f"the model draws random numbers in evaluation ({drawn}), so no two runs agree and none can be verified; "
            "make the noise an input of its forward, or export with verify=False"
        )
    precision_of(traced.graph_module)


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node is a tensor, as far as its traced value tells."""
    return "val" not in node.meta or isinstance(node.meta["val"], torch.Tensor)


def graph_to_translate(traced: TracedModel) -> fx.GraphModule:
    """A copy of a trace's graph in evaluation mode, of PyTorch's operators, each with its traced value.

    Args:
        traced: The trace, with adapters folded.

    Raises:
        ExportError: Its graph calls what is not an operator, and cannot be captured again.
    """
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module))
    set_mode(graph_module.graph, False)
    drop_regions_for_inference(graph_module.graph)
    graph_module.train(False)
    is_noted = all("val" in node.meta for node in graph_module.graph.find_nodes(op="placeholder"))  # pickle leaves it
    if traced.example_inputs.get(PAST) is not None and is_noted:
        return graph_module
    return _as_operators(graph_module, traced)


def _as_operators(graph_module: fx.GraphModule, traced: TracedModel) -> fx.GraphModule:
    """The graph itself if it can be translated, else captured again, such as a symbolic trace that calls modules."""
    if is_operator_graph(graph_module.graph):
        return graph_module
    try:
        return recapture(graph_module, traced.graph_inputs, dynamic=traced.signature.dynamic)
    except Exception as error:  # torch.export raises errors of every type
        raise ExportError(f"the graph cannot be captured as PyTorch's operators: {first_line(error)}") from error
