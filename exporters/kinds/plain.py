"""A model without a cache as one ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from gralora_fx.base.compat.torch_graphs import tree_info, tree_map, tree_map_with_path, tree_unflatten
from gralora_fx.base.compat.transformers_exporters import fix_model, leaf_names
from gralora_fx.core.graph.pipeline import Pass, PassResult
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.tracing.check import gap
from gralora_fx.core.tracing.inputs.input_trees import key_text
from gralora_fx.core.tracing.inputs.signature import own_inputs
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, listed
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.kinds.flavour import (
    Flavour,
    Models,
    insertion_passes,
    lowering_passes,
    marking_passes,
    noting_passes,
    storing_passes,
    with_rows,
)
from gralora_fx.exporters.rules.attention.attention_passes import FuseDotProductAttention, match_attention
from gralora_fx.exporters.rules.clean_up import (
    FoldConstants,
    deduplicate_constants,
    drop_stack_traces,
    remove_unused_nodes,
)
from gralora_fx.exporters.rules.normalization import LowerNorms, match_rms_norms
from gralora_fx.exporters.rules.onnx_pipeline import OnnxIrPass, OnnxPipeline
from gralora_fx.exporters.rules.products.float_matrices import fill_vectors, fold_transposes, part_transposes
from gralora_fx.exporters.rules.rows.flatten_tokens import FlattenTokens, copied
from gralora_fx.exporters.rules.rows.graph_ends import float32_inputs
from gralora_fx.exporters.rules.rows.row_tokens import RowsError
from gralora_fx.exporters.translation.export_graphs import CastGraph, graph_to_translate
from gralora_fx.exporters.translation.names import axes_of_rows, input_names, name_axes, name_outputs
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verify.cases import Verification, plain_inputs
from gralora_fx.exporters.verify.outputs import compare_rows, flat, named_outputs, run_model
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, DATA
from gralora_fx.format.export_directory import MODEL, PLAIN_KIND


def translated_passes(conversion: Conversion, may_fold: Callable[[ir.Node], bool | None]) -> tuple[Pass[ir.Model], ...]:
    """Return the passes over a graph as translated, if no cache is fused into its attention."""
    return (
        *marking_passes(conversion),  # first: weights still have their names
        fold_transposes,  # first: constant folding would compute the transposes of weights
        FuseDotProductAttention(),  # before constants are folded: it makes some
        *lowering_passes(conversion),
        LowerNorms(fuses_additions=False),  # on a CPU the fused operator is slower than both
        FoldConstants(may_fold),
        remove_unused_nodes,  # so that unused nodes do not count as readers of tokens
        FlattenTokens(not conversion.options.keep_padding),  # the nodes between one attention and the next
        fill_vectors,
    )


def plain_models(conversion: Conversion) -> Models:
    """Return the ONNX model of a graph without a cache, and with adapters as data one with an adapter for each row."""
    log = conversion.log
    graph_module, outputs = _with_flat_outputs(graph_to_translate(conversion.traced))
    first = [CastGraph(conversion.options.precision)]  # casts are seen before anything is simplified
    passes = (match_rms_norms, match_attention, *noting_passes(conversion))
    model = translate(graph_module, *passes, first=first, log=log)
    model = plain_pipeline(conversion, outputs).run(model, log)
    copy = copied(model) if conversion.options.adapters == DATA else None
    model = finishing_pipeline(conversion, "plain").run(model, log)
    if copy is None:
        return {MODEL: model}

    def rows_model(by_row: Conversion) -> ir.Model:
        model = check_rows(finishing_pipeline(by_row, "rows").run(copy, by_row.log))
        check_each_row(conversion.traced)
        return model

    return with_rows(model, conversion, rows_model)


def plain_pipeline(conversion: Conversion, outputs: Sequence[str]) -> OnnxPipeline:
    """Return the passes over a translated graph without a cache."""
    return OnnxPipeline(
        "plain",
        (
            *translated_passes(conversion, _may_fold),
            OnnxIrPass(LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)),
            deduplicate_constants,
            OnnxIrPass(CommonSubexpressionEliminationPass()),  # equal constants have one name by now
            OnnxIrPass(OutputFixPass()),  # two outputs may be the same value by now
            NameEnds(tuple(input_names(conversion.traced.graph_inputs)), tuple(outputs)),
            OnnxIrPass(NameFixPass()),
            name_outputs,
            name_axes,
            fix_nodes,
            drop_stack_traces,
            float32_inputs,  # after the inputs have their names
        ),
    )


def finishing_pipeline(conversion: Conversion, name: str) -> OnnxPipeline:
    """Return the passes that add adapters and quantize weights; all else in the graph is final."""
    return OnnxPipeline(
        name,
        (
            *insertion_passes(conversion),  # after all fusions
            part_transposes,
            *storing_passes(conversion),  # last: all other passes expect float matrices
        ),
    )


def check_rows(model: ir.Model) -> ir.Model:
    """Return a model whose rows choose among adapters, if its outputs are by row too."""
    batch = next(str(value.shape[0]) for value in model.graph.inputs if value.name == ADAPTER_IDS and value.shape)
    others = [str(value.name) for value in model.graph.outputs if not value.shape or str(value.shape[0]) != batch]
    if others:
        raise RowsError(f"the first axis of the output {listed(others, 3)} is not the batch")
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type in ("LSTM", "GRU", "RNN") and node.inputs[0] else None
        if node.op_type in ("LSTM", "GRU", "RNN") and (before is None or before.op_type != "Transpose"):
            raise RowsError(
                f"the first axis of the input of {node.op_type} is its length, not the batch (batch_first is False)"
            )
    return model


def check_each_row(traced: TracedModel) -> None:
    """Raise if a row's outputs depend on the rows beside it, as where a forward reads `x.numel()` or `x.mean(0)`."""
    by_row = axes_of_rows(traced)

    def rows(count: int) -> dict[str, Any]:
        def chosen(keys: Any, value: Any) -> Any:
            for axis in by_row.get(".".join(map(key_text, keys)), ()) if isinstance(value, Tensor) else ():
                first, last = value.narrow(axis, 0, 1), value.narrow(axis, -1, 1)
                value = torch.cat([first, last if value.shape[axis] > 1 else first.flip(-1)][:count], axis)
            return value

        result: dict[str, Any] = tree_map_with_path(chosen, dict(traced.graph_inputs))
        return result

    try:
        alone, both = (flat(named_outputs(run_model(traced, f"{n} rows", **own_inputs(rows(n))))) for n in (1, 2))
    except ExportError as error:
        raise RowsError(str(error)) from error
    if differs := [name for name, value in alone.items() if gap(value, both[name][:1]) is not None]:
        raise RowsError(f"the output {listed(differs, 3)} of a row depends on the rows beside it")


def _may_fold(node: ir.Node) -> bool | None:
    """Return whether constants may be folded at a node: not at the transpose of a weight, nor at a resize."""
    return False if node.op_type == "Resize" else unless_weight(node)


def _with_flat_outputs(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """Return a copy of a graph with its outputs flattened to tensors, and the tensors' names."""
    graph = copy_graph(graph_module)
    output = graph.output_node()
    info = tree_info(graph)
    results: Any = output.args[0]
    if info is not None:
        results = tree_unflatten(results, info.out_spec)
    nodes: dict[int, fx.Node] = {}

    def token(value: Any) -> Any:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
            return None
        placeholder = torch.empty(0)
        nodes[id(placeholder)] = value
        tokens.append(placeholder)
        return placeholder

    tokens: list[Tensor] = []
    named_tokens = leaf_names(tree_map(token, results))
    output.args = (tuple(nodes[id(tensor)] for tensor in named_tokens.values()),)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and not isinstance(node.meta.get("val"), Tensor):
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(graph_module, graph), list(named_tokens)


@dataclass(frozen=True)
class NameEnds:
    """Name inputs and outputs; an output with the name of an input gets a prefix."""

    inputs: tuple[str, ...]  # names of the inputs
    outputs: tuple[str, ...]  # names of the outputs

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


PLAIN = Flavour(
    PLAIN_KIND,
    convert=plain_models,
    verification=Verification(plain_inputs, compare_tokens=compare_rows),
    shares_weights=True,
)
