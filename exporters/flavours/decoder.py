"""A decoder with a cache: a graph for prefill and single steps, and one whose rows have lengths of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from torch import fx

from gralora_fx.errors import ExportError, listed
from gralora_fx.exporters.adapters_as_data import DataSites, by_row
from gralora_fx.exporters.artifact.genai_config import write_genai_config
from gralora_fx.exporters.flavours.flavour import Flavour, Models, Request, with_rows
from gralora_fx.exporters.fx_passes.cast_graph import CastGraph, float32_inputs
from gralora_fx.exporters.fx_passes.match_attention import match_attention
from gralora_fx.exporters.onnx_passes.cached_attention import FuseAttention
from gralora_fx.exporters.onnx_passes.clean_up import FoldConstants, drop_stack_traces, remove_unused_nodes
from gralora_fx.exporters.onnx_passes.continuous_batching import LogitsOfRows, batch_continuously
from gralora_fx.exporters.onnx_passes.copies import copied
from gralora_fx.exporters.onnx_passes.data_adapters import insertion_passes, marking_passes
from gralora_fx.exporters.onnx_passes.fold_transposes import fold_transposes
from gralora_fx.exporters.onnx_passes.keep_last_position import keep_last_position
from gralora_fx.exporters.onnx_passes.merge_matmuls import merge_matmuls
from gralora_fx.exporters.onnx_passes.normalization import LowerNorms, match_rms_norms
from gralora_fx.exporters.onnx_passes.plain_attention import FuseDotProductAttention
from gralora_fx.exporters.onnx_passes.quantization import quantization_passes
from gralora_fx.exporters.onnx_passes.rotary import LowerRotary, RotaryTables, match_rotary
from gralora_fx.exporters.onnx_passes.row_tokens import RowsError
from gralora_fx.exporters.onnx_pipeline import OnnxPipeline
from gralora_fx.exporters.options import DYNAMIC, ExportOptions
from gralora_fx.exporters.reports import AttentionReport
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.exporters.verification.decoder_inputs import decoder_inputs, drop_padding
from gralora_fx.exporters.verification.greedy_tokens import compare_tokens
from gralora_fx.exporters.verification.prompts import random_prompts
from gralora_fx.graph.pipeline import Pass, PassLog, PassResult
from gralora_fx.runtime.export_directory import DECODER_KIND, MODEL
from gralora_fx.tracing.inputs.decoder_cache import CacheLayout, cached_tensors
from gralora_fx.tracing.traced_model import TracedModel


def decoder_models(
    graph_module: fx.GraphModule,
    options: ExportOptions,
    log: PassLog,
    *,
    num_cache_outputs: int = 0,
    data: DataSites | None = None,
) -> Models:
    """The ONNX models of a traced decoder step, by the names of their files.

    Before: `logits, keys and values = forward(input_ids, attention_mask, position_ids, past keys and values)`
    After:  the same with `past_key_values.N.key|value` in and `present.N.key|value` out, attention fused, and logits of
            the last position only unless all are asked for

    `model` reads one length of all rows, with a mask; `model_rows` rows of their own lengths (see
    `batch_continuously`), with the same weights. Where there can be no such graph, the reason is a `RowsEntry` in the
    log.

    Args:
        graph_module: A graph traced with a cache, without adapters, in evaluation mode.
        options: The options of the export.
        log: Gets a report for each pass, an `AttentionReport` and a `RowsEntry`.
        num_cache_outputs: How many outputs after the logits are a cache's.
        data: The layers whose adapters are data of the models; None for none.

    Raises:
        ExportError: The graph cannot be expressed in ONNX.
    """
    model = translate(
        graph_module,
        match_rms_norms,
        match_rotary,
        match_attention,
        first=[CastGraph(options.precision, num_cache_outputs)],  # casts are seen before anything is simplified
        log=log,
    )
    model = attention_pipeline(RotaryTables(model.graph), data).run(model, log)
    copy = copied(model)
    last = [keep_last_position] if options.logits == "last" else []
    model = decoder_pipeline("decoder", last, options, data).run(model, log)
    return with_rows(model, lambda apart: _rows_model(copy, options, by_row(data), log, apart), log)


def _rows_model(
    model: ir.Model, options: ExportOptions, data: DataSites | None, found: PassLog, log: PassLog
) -> ir.Model:
    """The graph whose rows have lengths of their own, made of one with fused attention.

    Args:
        model: The model; it is changed in place.
        options: The options of the export.
        data: The layers whose adapters are chosen by row; None for none.
        found: Knows which layers' attention is fused.
        log: Gets a report for each pass.

    Raises:
        RowsError: The model does not allow it.
    """
    if options.quantize == DYNAMIC:
        raise RowsError(
            f"quantize={DYNAMIC!r} rounds a batch by its largest value, so a row would depend on the others"
        )
    for report in found.summaries(AttentionReport):
        if report.cached and report.plain:
            layers = listed([f"{layer} ({why})" for layer, why in report.plain.items()], 4)
            raise RowsError(f"rows of their own lengths need GroupQueryAttention, and it does not fit {layers}")
    by_rows: list[Pass[ir.Model]] = [batch_continuously, LogitsOfRows(options.logits)]
    return decoder_pipeline("rows", by_rows, options, data).run(model, log)


def attention_pipeline(tables: RotaryTables, data: DataSites | None = None) -> OnnxPipeline:
    """The passes over a translated decoder, before it becomes a graph of one length or one of rows.

    Args:
        tables: The tables of rotary embeddings in its graph.
        data: The layers whose adapters are data of the models; None for none.
    """
    return OnnxPipeline(
        "decoder",
        (
            *marking_passes(data),  # first: weights have their own names
            fold_transposes,  # first: packing and merging of matmuls look for weights, not for their transposes
            FuseAttention(tables),  # absorbs the rotary embeddings before it where it can
            LowerRotary(tables),  # those that attention did not absorb
            FuseDotProductAttention(),  # attention without a cache, or that the model computes by hand
            name_cache,
        ),
    )


def decoder_pipeline(
    name: str, positions: Sequence[Pass[ir.Model]], options: ExportOptions, data: DataSites | None = None
) -> OnnxPipeline:
    """The passes over a decoder with fused attention.

    Args:
        name: The graph.
        positions: The passes that choose which positions are computed.
        options: The options of the export.
        data: The layers whose adapters are data of the model; None for none.
    """
    return OnnxPipeline(
        name,
        (
            *positions,  # before norms, which fused they could not cut
            LowerNorms(),
            remove_unused_nodes,  # so that a matmul that nothing reads any more is not merged
            merge_matmuls,
            FoldConstants(unless_weight),
            remove_unused_nodes,
            name_axes,
            drop_stack_traces,
            float32_inputs,  # after the inputs have their names, which tell those of the cache
            *insertion_passes(data, quantized=options.quantization is not None),  # what was packed stays packed
            *quantization_passes(options.quantization),  # last: all others look for matrices
        ),
    )


def name_cache(model: ir.Model) -> PassResult[ir.Model]:
    """Name inputs and outputs as the ecosystem expects them."""
    pasts = [value for value in model.graph.inputs if str(value.name).startswith("past_key_values")]
    logits, *presents = model.graph.outputs
    if len(pasts) != len(presents) or len(pasts) % 2:
        raise ExportError(f"the trace takes {len(pasts)} cached tensors and returns {len(presents)}; trace it again")
    logits.name = "logits"
    for index, (past, present) in enumerate(zip(pasts, presents, strict=True)):
        part = f"{index // 2}.{'value' if index % 2 else 'key'}"
        past.name, present.name = f"past_key_values.{part}", f"present.{part}"
    return PassResult(2 * len(pasts) + 1)


def _convert(request: Request) -> Models:
    count = cached_tensors(request.traced.example_inputs)
    return decoder_models(
        request.graph_module, request.options, request.log, num_cache_outputs=count, data=request.data
    )


def _write_files(directory: Path, traced: TracedModel, models: Models) -> None:
    write_genai_config(directory, traced.config, models[MODEL])


DECODER = Flavour(
    DECODER_KIND,
    fits=lambda traced: traced.cache_layout is CacheLayout.DECODER,
    convert=_convert,
    verification=Verification(decoder_inputs, drop_padding, random_prompts, compare_tokens),
    write_files=_write_files,
    has_last_logits=True,
    shares_weights=True,
)
