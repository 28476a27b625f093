"""A model without a cache as one ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    OutputFixPass,
)
from torch import Tensor, fx

from gralora_fx.compat import pytree
from gralora_fx.compat.torch_graphs import tree_info
from gralora_fx.compat.transformers_exporters import fix_model, leaf_names
from gralora_fx.errors import listed
from gralora_fx.exporters.adapters_as_data import DataSites, by_row
from gralora_fx.exporters.flavours.flavour import Flavour, Models, Request, with_rows
from gralora_fx.exporters.flavours.translated_passes import translated_passes
from gralora_fx.exporters.fx_passes.cast_graph import CastGraph, float32_inputs
from gralora_fx.exporters.fx_passes.match_attention import match_attention
from gralora_fx.exporters.onnx_passes.clean_up import (
    deduplicate_constants,
    drop_stack_traces,
)
from gralora_fx.exporters.onnx_passes.copies import copied
from gralora_fx.exporters.onnx_passes.data_adapters import insertion_passes
from gralora_fx.exporters.onnx_passes.normalization import match_rms_norms
from gralora_fx.exporters.onnx_passes.quantization import quantization_passes
from gralora_fx.exporters.onnx_passes.row_tokens import RowsError
from gralora_fx.exporters.onnx_pipeline import OnnxIrPass, OnnxPipeline
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.translation.names import input_names, name_axes, name_outputs
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verification.adapters_by_row import compare_rows
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.exporters.verification.plain_inputs import drop_padding, plain_inputs
from gralora_fx.graph.pipeline import PassLog, PassResult
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.runtime.adapter_inputs import ADAPTER_IDS, DATA
from gralora_fx.runtime.export_directory import MODEL, PLAIN_KIND


def plain_models(
    graph_module: fx.GraphModule,
    inputs: Mapping[str, Any],
    options: ExportOptions,
    log: PassLog,
    data: DataSites | None = None,
) -> Models:
    """The ONNX model of a traced graph without a cache; with adapters as data also one whose rows have one each.

    Args:
        graph_module: The graph, without adapters, in evaluation mode, every node with the value that tracing noted.
        inputs: The inputs it was traced with, by name.
        options: The options of the export.
        log: Receives a report for each pass.
        data: The layers whose adapters are data of the model; None for none.

    Raises:
        ExportError: The graph cannot be expressed in ONNX.
    """
    graph_module, outputs = _with_flat_outputs(graph_module)
    first = [CastGraph(options.precision)]  # casts are seen before anything is simplified
    model = translate(graph_module, match_rms_norms, match_attention, first=first, log=log)
    model = plain_pipeline(input_names(inputs), outputs, options, data).run(model, log)
    copy = copied(model) if options.adapters == DATA else None
    model = finishing_pipeline("plain", options, data).run(model, log)
    if copy is None:
        return {MODEL: model}
    rows = finishing_pipeline("rows", options, by_row(data))

    def by_rows(apart: PassLog) -> ir.Model:
        return check_rows(rows.run(copy, apart))

    return with_rows(model, by_rows, log)


def plain_pipeline(
    inputs: list[str], outputs: list[str], options: ExportOptions, data: DataSites | None = None
) -> OnnxPipeline:
    """The passes over a translated graph without a cache.

    Args:
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        options: The options of the export.
        data: The layers whose adapters are data of the model; None for none.
    """
    return OnnxPipeline(
        "plain",
        (
            *translated_passes(options, data, _may_fold),
            OnnxIrPass(LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)),
            deduplicate_constants,
            OnnxIrPass(CommonSubexpressionEliminationPass()),  # equal constants have one name by now
            OnnxIrPass(OutputFixPass()),  # two outputs may be the same value by now
            NameEnds(tuple(inputs), tuple(outputs)),
            OnnxIrPass(NameFixPass()),
            name_outputs,
            name_axes,
            fix_nodes,
            drop_stack_traces,
            float32_inputs,  # after the inputs have their names
        ),
    )


def finishing_pipeline(name: str, options: ExportOptions, data: DataSites | None = None) -> OnnxPipeline:
    """The passes over a graph that is what it is but for adapters and quantized weights.

    Args:
        name: The graph.
        options: The options of the export.
        data: The layers whose adapters are data of the model; None for none.
    """
    return OnnxPipeline(
        name,
        (
            *insertion_passes(data, quantized=options.quantization is not None),  # what was fused stays fused
            *quantization_passes(options.quantization),  # last: all others look for matrices
        ),
    )


def check_rows(model: ir.Model) -> ir.Model:
    """A model whose rows choose among adapters, if its outputs are made of rows too.

    Raises:
        RowsError: An output has another first axis than the batch, so rows depend on each other, or may do so.
    """
    batch = next(str(value.shape[0]) for value in model.graph.inputs if value.name == ADAPTER_IDS and value.shape)
    others = [str(value.name) for value in model.graph.outputs if not value.shape or str(value.shape[0]) != batch]
    if others:
        raise RowsError(f"the first axis of the output {listed(others, 3)} is not the batch")
    return model


def _may_fold(node: ir.Node) -> bool | None:
    """Whether constants may be folded at a node: not at the transpose of a weight, nor at a resize."""
    return False if node.op_type == "Resize" else unless_weight(node)


def _with_flat_outputs(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """A copy of a graph whose outputs are flattened to tensors, and the tensors' names."""
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
        placeholder = torch.empty(0)
        nodes[id(placeholder)] = value
        tokens.append(placeholder)
        return placeholder

    tokens: list[Tensor] = []
    named_tokens = leaf_names(pytree.tree_map(token, results))
    output.args = (tuple(nodes[id(tensor)] for tensor in named_tokens.values()),)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and not isinstance(node.meta.get("val"), Tensor):
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(graph_module, graph), list(named_tokens)


@dataclass(frozen=True)
class NameEnds:
    """Name inputs and outputs; an output with the name of an input gets a prefix.

    Attributes:
        inputs: Names of the inputs.
        outputs: Names of the outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Rename them, in place."""
        if len(self.inputs) == len(model.graph.inputs):
            for value, name in zip(model.graph.inputs, self.inputs, strict=True):
                value.name = name
        for value, name in zip(model.graph.outputs, self.outputs, strict=True):
            value.name = f"output.{name}" if name in self.inputs else name
        return PassResult(len(model.graph.inputs) + len(model.graph.outputs))


def fix_nodes(model: ir.Model) -> PassResult[ir.Model]:
    """Rewrite nodes that an execution provider refuses, as transformers' exporter does; in place."""
    before = len(model.graph)
    fix_model(model)
    return PassResult(abs(len(model.graph) - before))


def _convert(request: Request) -> Models:
    inputs = request.traced.graph_inputs
    return plain_models(request.graph_module, inputs, request.options, request.log, request.data)


PLAIN = Flavour(
    PLAIN_KIND,
    fits=lambda traced: True,
    convert=_convert,
    verification=Verification(plain_inputs, drop_padding, compare_tokens=compare_rows),
    shares_weights=True,
)
