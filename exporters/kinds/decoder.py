"""A decoder with a cache: a graph for prefill and single steps, and one whose rows have their own lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from gralora_fx.base.features import parts
from gralora_fx.core.graph.pipeline import Pass, PassLog, PassResult
from gralora_fx.core.tracing.inputs.cache import cached_slots
from gralora_fx.errors import ExportError, listed
from gralora_fx.exporters.artifact.program_files import write_genai_config
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
from gralora_fx.exporters.reports import CachedAttentionReport
from gralora_fx.exporters.rules.attention.attention_passes import FuseDotProductAttention, match_attention
from gralora_fx.exporters.rules.attention.cached_attention import FuseAttention
from gralora_fx.exporters.rules.attention.rotary import LowerRotary, RotaryTables, match_rotary
from gralora_fx.exporters.rules.clean_up import FoldConstants, drop_stack_traces, remove_unused_nodes
from gralora_fx.exporters.rules.normalization import LowerNorms, match_rms_norms
from gralora_fx.exporters.rules.onnx_pipeline import (
    FOLDED_TRANSPOSES,
    FUSED_CACHED_ATTENTION,
    ROTARY_NODES,
    TRANSLATED,
    OnnxIrPass,
    OnnxPipeline,
)
from gralora_fx.exporters.rules.products.float_matrices import fill_vectors, fold_transposes, merge_matmuls
from gralora_fx.exporters.rules.rows.continuous_batching import LogitsOfRows, batch_continuously
from gralora_fx.exporters.rules.rows.graph_ends import float32_inputs, keep_last_position, optional_inputs_of_rows
from gralora_fx.exporters.rules.rows.row_tokens import RowsError
from gralora_fx.exporters.translation.export_graphs import CastGraph, step_to_translate
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verify.cases import Verification, decoder_inputs, random_prompts
from gralora_fx.exporters.verify.greedy_tokens import compare_decoder
from gralora_fx.format.cache_slots import CacheSlot
from gralora_fx.format.export_directory import DECODER_KIND
from gralora_fx.format.input_names import PAST


def decoder_models(conversion: Conversion) -> Models:
    """Return the ONNX models of a traced decoder step, by the names of their files.

    Before: `logits, cache = forward(input_ids, attention_mask, position_ids, past cache)`
    After:  the same with `past_key_values.N.key|value|conv|recurrent` in and `present.N....` out, attention fused, and
            logits of the last position only unless all are requested

    `model` reads rows of one length, with a mask; `model_rows` reads rows of different lengths (see
    `batch_continuously`) with the same weights, or a `RowsEntry` in the log says why there is none.
    """
    options, log = conversion.options, conversion.log
    casts = CastGraph(options.precision, tuple(slot.kind for slot in cached_slots(conversion.traced.example_inputs)))
    model = translate(
        step_to_translate(conversion.traced),
        match_rms_norms,
        match_rotary,
        match_attention,
        *noting_passes(conversion),
        first=[casts],  # casts are seen before anything is simplified
        log=log,
    )
    model = attention_pipeline(conversion, RotaryTables(model.graph)).run(model, log)
    copy = model.clone()  # over the same tensors
    copy.meta.update(model.meta)
    last = [keep_last_position] if options.logits == "last" else []
    model = decoder_pipeline(conversion, "decoder", last).run(model, log)
    return with_rows(model, conversion, lambda by_row: _rows_model(copy, by_row, log))


def _rows_model(model: ir.Model, conversion: Conversion, found: PassLog) -> ir.Model:
    """Return the graph whose rows have their own lengths, made from one with fused attention."""
    for report in found.summaries(CachedAttentionReport):
        if report.plain:
            layers = listed([f"{layer} ({why})" for layer, why in report.plain.items()], 4)
            raise RowsError(f"rows of their own lengths need GroupQueryAttention, and it does not fit {layers}")
    by_rows: list[Pass[ir.Model]] = [batch_continuously, LogitsOfRows(conversion.options.logits)]
    return decoder_pipeline(conversion, "rows", by_rows).run(model, conversion.log)


def attention_pipeline(conversion: Conversion, tables: RotaryTables) -> OnnxPipeline:
    """Return the passes over a translated decoder, before it becomes a graph of one length or one of rows."""
    slots = tuple(cached_slots(conversion.traced.example_inputs))
    return OnnxPipeline(
        "decoder",
        (
            *marking_passes(conversion),  # first: weights still have their names
            fold_transposes,
            # absorbs the rotary embeddings before it if it can
            FuseAttention(tables, has_attention=any(slot.kind.grows for slot in slots)),
            LowerRotary(tables),  # rotary embeddings that attention did not absorb
            FuseDotProductAttention(),  # attention without a cache, or written out in the model
            *lowering_passes(conversion),
            NameCache(slots),
            *parts("cache passes", conversion.traced.operators),
        ),
    )


def decoder_pipeline(conversion: Conversion, name: str, positions: Sequence[Pass[ir.Model]]) -> OnnxPipeline:
    """Return the passes over a decoder with fused attention."""
    return OnnxPipeline(
        name,
        (
            *positions,
            LowerNorms(),
            *(form for passes in parts("form passes", conversion.traced.operators) for form in passes),
            remove_unused_nodes,  # so that a matmul that nothing reads any more is not merged
            merge_matmuls,
            FoldConstants(unless_weight),
            remove_unused_nodes,
            fill_vectors,
            name_axes,
            drop_stack_traces,
            float32_inputs,  # after the inputs have their names, by which it finds the cache
            *parts("optional inputs", conversion.traced.signature.inputs),  # after all folding
            optional_inputs_of_rows,
            *insertion_passes(conversion),  # after packing
            OnnxIrPass(CommonSubexpressionEliminationPass()),  # sessions over its rows leave it out
            *storing_passes(conversion),
        ),
        given=TRANSLATED - {ROTARY_NODES} | {FOLDED_TRANSPOSES, FUSED_CACHED_ATTENTION},
    )


@dataclass(frozen=True)
class NameCache:
    """Name inputs and outputs as optimum and onnxruntime-genai do."""

    slots: tuple[CacheSlot, ...]  # the tensors of the cache, in the order of the graph's inputs and outputs

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Rename them in place."""
        pasts = [value for value in model.graph.inputs if str(value.name).startswith(PAST)]
        logits, *presents = model.graph.outputs
        if not len(pasts) == len(presents) == len(self.slots):
            counts = f"{len(pasts)} cached tensors and returns {len(presents)}"
            raise ExportError(f"the trace takes {counts}; trace it again")
        logits.name = "logits"
        for slot, past, present in zip(self.slots, pasts, presents, strict=True):
            past.name, present.name = slot.past, slot.present
        return PassResult(2 * len(pasts) + 1)


DECODER = Flavour(
    DECODER_KIND,
    convert=decoder_models,
    verification=Verification(decoder_inputs, random_prompts, compare_decoder),
    write_files=lambda directory, traced, models: write_genai_config(directory, traced.config, models),
    has_last_logits=True,
    shares_weights=True,
    has_companions=True,
)
