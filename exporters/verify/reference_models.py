"""Models that an export is compared with: with its weights, rounded as the export's are, or in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import fx, nn

from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.core.graph.overlay import map_parameters
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.normalize.modes import set_mode
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import base_trace, fold_adapters
from gralora_fx.exporters.translation.cast_graph import DTYPES, cast_graph, precision_of
from gralora_fx.format.manifest import Manifest

_ROWS = 4096  # dequantized at once


@contextmanager
def evaluating(model: TracedModel | GraloraModel, reference: TracedModel | GraloraModel) -> Iterator[None]:
    """The reference in evaluation mode; afterwards it is in the model's again."""
    was_training = model.training
    reference.eval()
    try:
        yield
    finally:
        reference.train(was_training)


def reference_model(
    model: TracedModel | GraloraModel, manifest: Manifest, directory: Path
) -> TracedModel | GraloraModel:
    """The model itself; for an export of another precision, the adapter-free model with the same rounded weights.

    A quantized weight is what the export holds, if that is what the model's weight may be rounded to; else it is the
    model's own, and a comparison shows the difference. So nothing here depends on how a weight was rounded.
    """
    precision, quantized = manifest.precision, manifest.quantization
    traced = base_trace(model)
    if quantized is None and {precision, precision_of(traced.graph_module)} == {"fp32"}:
        return model
    reference = float32_model(fold_adapters(model), precision)
    if quantized is None:
        return reference
    from gralora_fx.exporters.verify.quantized_references import with_stored_weights

    return with_stored_weights(reference, traced, quantized, directory)


def float32_model(traced: TracedModel, precision: str) -> TracedModel:
    """The model in float32 arithmetic with weights of its own, in memory, which were rounded to a precision."""
    dtype = DTYPES[precision]
    graph_module = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "RoundedGraph")
    set_mode(graph_module.graph, False)
    graph_module = cast_graph(graph_module, "fp32")

    def cast(parameter: nn.Parameter, name: str) -> nn.Parameter:
        values = values_of(parameter, name)
        values = values.to(dtype).float() if values.is_floating_point() else values
        return nn.Parameter(values, requires_grad=False)

    map_parameters(graph_module, cast)
    graph_parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    names = {
        id(own): graph_parameters[name] for name, own in traced.tree.parameters.items() if name in graph_parameters
    }  # under other names too
    parameters = {name: names.get(id(own), own) for name, own in traced.tree.parameters.items()}
    return traced.with_graph(graph_module, dataclasses.replace(traced.tree, parameters=parameters)).eval()
