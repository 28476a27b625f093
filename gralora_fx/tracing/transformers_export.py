"""The one file that touches `transformers.exporters`, which its makers call experimental."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
from transformers.exporters.utils import apply_fx_node_fixes

from gralora_fx.tracing.attention import fused_attention
from gralora_fx.tracing.cached import PAST, copied
from gralora_fx.tracing.clean import copy_graph
from gralora_fx.tracing.quiet import quiet


def export_transformers_model(
    model: PreTrainedModel, inputs: Mapping[str, Any], *, dynamic: bool
) -> torch.export.ExportedProgram:
    """Export a transformers model in the mode it stands in, with a cache if one is given: attention is one node then.

    Args:
        model: The model; its modules and parameters are left as they are.
        inputs: Keyword inputs of its forward; past keys and values among them mean a step with a cache.
        dynamic: Whether every axis of every input that may vary does.

    Returns:
        A program over the model's own parameters.
    """
    shapes = dynamic_axes(inputs) if dynamic else None
    has_cache = PAST in inputs
    with quiet(), _calling(model, use_cache=has_cache), fused_attention(model) if has_cache else nullcontext():
        exported = DynamoExporter().export(model, copied(inputs), DynamoConfig(dynamic=dynamic, dynamic_shapes=shapes))
    program: torch.export.ExportedProgram = exported.program
    return program


def dynamic_axes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`dynamic_shapes` for `torch.export`: every axis may vary, of images the batch only, of a cache batch and length.

    Vision models are made for one size of image; with free height and width some cannot be traced.
    """
    shapes: dict[str, Any] = get_auto_dynamic_shapes(dict(inputs))
    if "pixel_values" in shapes:
        shapes["pixel_values"] = {0: torch.export.Dim.AUTO}
    if PAST in shapes:
        shapes[PAST] = [{0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO} for _ in shapes[PAST]]
    return shapes


@contextmanager
def _calling(model: PreTrainedModel, *, use_cache: bool) -> Iterator[None]:
    """Call the model with this `use_cache`, whether its config or only its forward knows the flag."""
    own = model.__dict__.get("forward")  # an override on the instance; the exporter leaves one behind
    if "use_cache" in inspect.signature(model.forward).parameters:
        model.forward = functools.partial(model.forward, use_cache=use_cache)
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own


def convert_to_onnx(graph_module: fx.GraphModule, inputs: Mapping[str, Any], config: Any, *, dynamic: bool) -> ir.Model:
    """Convert a traced graph to ONNX.

    Args:
        graph_module: A graph over parameters, in evaluation mode.
        inputs: Its inputs by name.
        config: The source model's configuration, or None.
        dynamic: Whether axes may vary.

    Returns:
        The ONNX model, its weights shared with the graph's parameters where their layout allows.
    """
    module = _Callable(_with_real_copies(graph_module), config)
    shapes = dynamic_axes(inputs) if dynamic else None
    with quiet():
        exported = OnnxExporter().export(module, dict(inputs), OnnxConfig(dynamic=dynamic, dynamic_shapes=shapes))
    program: ir.Model = exported.program
    return program


def onnx_translations() -> dict[Any, Any]:
    """The ONNX forms that transformers itself has for operators, such as those of experts, as onnxscript functions."""
    return dict(_ONNX_TRANSLATION_TABLE)


def fix_for_onnx(graph_module: fx.GraphModule) -> None:
    """Rewrite calls that torch's translation to ONNX misreads, as transformers' exporter does; in place."""
    apply_fx_node_fixes("onnx", graph_module)


class _Callable(nn.Module):
    """A graph as the module with a keyword forward that the exporter takes; handed over bare, it is refused."""

    def __init__(self, graph_module: fx.GraphModule, config: Any) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.config = config

    def forward(self, **inputs: Any) -> Any:
        return self.graph_module(**inputs)


def _with_real_copies(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph with `clone` in place of `contiguous`.

    Tracing again drops a `contiguous` that its own attention kernel makes needless; the kernel chosen for ONNX then
    returns another layout, which the `view` behind it cannot take. A `clone` is never dropped, and free in ONNX.
    """
    graph = copy_graph(graph_module)
    for node in graph.nodes:
        if node.target is torch.ops.aten.contiguous.default:
            node.target = torch.ops.aten.clone.default
            node.kwargs = {"memory_format": torch.contiguous_format}
    return fx.GraphModule(graph_module, graph)
