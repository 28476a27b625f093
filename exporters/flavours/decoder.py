"""A decoder with a cache as one ONNX graph for prefill and single steps."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from torch import fx

from gralora_fx.errors import ExportError
from gralora_fx.exporters.adapters_as_data import DataSites
from gralora_fx.exporters.artifact.genai_config import write_genai_config
from gralora_fx.exporters.flavours.flavour import Flavour, Models, Request
from gralora_fx.exporters.fx_passes.broadcast_attention import match_broadcast_attention
from gralora_fx.exporters.fx_passes.cast_graph import CastGraph, float32_inputs
from gralora_fx.exporters.fx_passes.match_attention import match_attention
from gralora_fx.exporters.onnx_passes.clean_up import FoldConstants, drop_stack_traces, remove_unused_nodes
from gralora_fx.exporters.onnx_passes.continuous_batching import LogitsOfRows, batch_continuously
from gralora_fx.exporters.onnx_passes.data_adapters import insertion_passes, marking_passes
from gralora_fx.exporters.onnx_passes.encoder_attention import FuseDotProductAttention
from gralora_fx.exporters.onnx_passes.fold_transposes import fold_transposes
from gralora_fx.exporters.onnx_passes.fuse_attention import FuseAttention
from gralora_fx.exporters.onnx_passes.keep_last_position import keep_last_position
from gralora_fx.exporters.onnx_passes.merge_matmuls import merge_matmuls
from gralora_fx.exporters.onnx_passes.normalization import LowerNorms, match_rms_norms
from gralora_fx.exporters.onnx_passes.quantization import quantization_passes
from gralora_fx.exporters.onnx_passes.rotary import LowerRotary, RotaryTables, match_rotary
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.pipeline import PassLog, PassResult, Pipeline
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.exporters.verification.decoder_inputs import decoder_inputs, drop_padding
from gralora_fx.exporters.verification.greedy_tokens import compare_tokens
from gralora_fx.exporters.verification.prompts import random_prompts
from gralora_fx.runtime.adapter_inputs import BATCHED
from gralora_fx.runtime.names import QUERY_SEQLENS
from gralora_fx.tracing.inputs.decoder_cache import CacheLayout, cached_tensors
from gralora_fx.tracing.traced_model import TracedModel


def decoder_model(
    graph_module: fx.GraphModule,
    options: ExportOptions,
    log: PassLog,
    *,
    num_cache_outputs: int = 0,
    data: DataSites | None = None,
) -> ir.Model:
    """The ONNX model of a traced decoder step.

    Before: `logits, keys and values = forward(input_ids, attention_mask, position_ids, past keys and values)`
    After:  the same with `past_key_values.N.key|value` in and `present.N.key|value` out, attention fused, and logits of
            the last position only unless all are asked for

    Args:
        graph_module: A graph traced with a cache, without adapters, in evaluation mode.
        options: The options of the export.
        log: Gets a report for each pass, and an `AttentionReport`.
        num_cache_outputs: How many outputs after the logits are a cache's.
        data: The layers whose adapters are data of the model; None for none.

    Raises:
        ExportError: The graph cannot be expressed in ONNX.
    """
    model = translate(
        graph_module,
        match_rms_norms,
        match_rotary,
        match_broadcast_attention,
        match_attention,
        first=[CastGraph(options.precision, num_cache_outputs)],  # casts are seen before anything is simplified
        log=log,
    )
    return decoder_pipeline(RotaryTables(model.graph), options, data).run(model, log)


def decoder_pipeline(tables: RotaryTables, options: ExportOptions, data: DataSites | None = None) -> Pipeline[ir.Model]:
    """The passes over a translated decoder.

    Args:
        tables: The tables of rotary embeddings in its graph.
        options: The options of the export.
        data: The layers whose adapters are data of the model; None for none.
    """
    is_batched = options.adapters == BATCHED
    last = [keep_last_position] if options.logits == "last" else []
    by_rows = [batch_continuously, LogitsOfRows(options.logits)]
    return Pipeline(
        "decoder",
        (
            *marking_passes(data),  # first: weights have their own names
            fold_transposes,  # first: packing and merging of matmuls look for weights, not for their transposes
            FuseAttention(tables, is_required=is_batched),  # absorbs the rotary embeddings before it where it can
            LowerRotary(tables),  # those that attention did not absorb
            FuseDotProductAttention(),  # attention without a cache, or that the model computes by hand
            name_cache,
            *(by_rows if is_batched else last),  # before norms, which fused it could not cut
            LowerNorms(),
            remove_unused_nodes,  # so that a matmul that nothing reads any more is not merged
            merge_matmuls,
            FoldConstants(unless_weight),
            remove_unused_nodes,
            name_axes,
            drop_stack_traces,
            float32_inputs,  # after the inputs have their names, which tell those of the cache
            *insertion_passes(data),  # what was packed stays packed
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
    model = decoder_model(
        request.graph_module, request.options, request.log, num_cache_outputs=count, data=request.data
    )
    return {"model": model}


def _write_files(directory: Path, traced: TracedModel, models: Models) -> None:
    if not any(value.name == QUERY_SEQLENS for value in models["model"].graph.inputs):  # genai does not drive these
        write_genai_config(directory, traced.config, models["model"])


DECODER = Flavour(
    "decoder",
    fits=lambda traced: traced.cache_layout is CacheLayout.DECODER,
    convert=_convert,
    verification=Verification(decoder_inputs, drop_padding, random_prompts, compare_tokens),
    write_files=_write_files,
    has_last_logits=True,
)
