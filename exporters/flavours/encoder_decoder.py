"""An encoder-decoder with a cache as two ONNX graphs in optimum's layout, which transformers.js reads too."""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from gralora_fx.exporters.conversion import Conversion
from gralora_fx.exporters.flavours.flavour import Flavour, Models, insertion_passes, note_rows, translated_passes
from gralora_fx.exporters.fx_passes.cast_graph import CastGraph, float32_inputs
from gralora_fx.exporters.fx_passes.export_graphs import graph_to_translate, split
from gralora_fx.exporters.fx_passes.match_attention import match_attention
from gralora_fx.exporters.onnx_passes.block_products import tables_of_heads
from gralora_fx.exporters.onnx_passes.clean_up import drop_stack_traces
from gralora_fx.exporters.onnx_passes.cross_attention import cache_cross_attention
from gralora_fx.exporters.onnx_passes.normalization import match_rms_norms
from gralora_fx.exporters.onnx_passes.quantize_weights import quantization_passes
from gralora_fx.exporters.onnx_pipeline import OnnxPipeline
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verification.cached_cases import encoder_decoder_inputs
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.exporters.verification.greedy_tokens import compare_encoder_decoder
from gralora_fx.runtime.export_directory import DECODER, ENCODER, ENCODER_DECODER_KIND
from gralora_fx.runtime.manifest import RowsEntry
from gralora_fx.tracing.inputs.cache import CacheLayout


def encoder_decoder_models(conversion: Conversion) -> Models:
    """The two ONNX models of a traced encoder-decoder, by the names of their files.

    `encoder_model`: `input_ids` or `input_features`, `attention_mask` -> `last_hidden_state`.

    `decoder_model_merged`: `input_ids, encoder_hidden_states, encoder_attention_mask, use_cache_branch` and
    `past_key_values.N.decoder|encoder.key|value` -> `logits` of every position and
    `present.N.decoder|encoder.key|value`. If `use_cache_branch` is false the past is not read; if true, the keys and
    values of the encoder's output are taken from the past and passed through. What the decoder reads of the encoder is
    float32.

    Args:
        conversion: What is converted.

    Raises:
        ExportError: The graph cannot be split or cannot be expressed in ONNX.
    """
    precision, log = conversion.options.precision, conversion.log
    parts = split(graph_to_translate(conversion.traced))
    encoder = _translated(conversion, "encoder", parts.encoder, CastGraph(precision))
    decoder = _translated(conversion, "decoder", parts.decoder, CastGraph(precision, len(parts.outputs) - 1))
    encoder.graph.outputs[0].name = "last_hidden_state"
    pasts = [value for value in decoder.graph.inputs if str(value.name).startswith("past_key_values")]
    for index, value in enumerate(pasts):
        value.name = f"past_key_values.{index // 2}.decoder.{'value' if index % 2 else 'key'}"
    for value, name in zip(decoder.graph.outputs, parts.outputs, strict=True):
        value.name = name
    tables = frozenset(tables_of_heads(encoder) | tables_of_heads(decoder))
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        named_pipeline(conversion, name, tables).run(model, log)
    if conversion.adapters is not None:
        note_rows(
            RowsEntry(None, "rows of an encoder-decoder run one after the other, each with its adapter"), decoder, log
        )
    return {ENCODER: encoder, DECODER: decoder}


def _translated(conversion: Conversion, name: str, graph_module: fx.GraphModule, cast: CastGraph) -> ir.Model:
    first = [cast]  # casts are seen before anything is simplified
    model = translate(graph_module, match_rms_norms, match_attention, first=first, log=conversion.log, name=name)
    return translated_pipeline(conversion, name).run(model, conversion.log)


def translated_pipeline(conversion: Conversion, name: str) -> OnnxPipeline:
    """What either part goes through as it was translated.

    Args:
        conversion: What is converted.
        name: The part.
    """
    return OnnxPipeline(
        name,
        (
            *translated_passes(conversion, unless_weight),
            drop_stack_traces,
        ),
    )


def named_pipeline(conversion: Conversion, name: str, tables: frozenset[str]) -> OnnxPipeline:
    """What a part goes through once its inputs and outputs have their names.

    Args:
        conversion: What is converted.
        name: The part.
        tables: Names of embeddings that are a head's weight in either part.
    """
    return OnnxPipeline(
        name,
        (
            name_axes,
            *insertion_passes(
                conversion
            ),  # what was fused stays fused; before the keys' projections move into a branch
            *([cache_cross_attention] if name == "decoder" else []),  # finds the cache by the names
            float32_inputs,  # so do those inputs that are not of the cache
            *quantization_passes(conversion.plan, tables),  # last: all others look for matrices
        ),
    )


ENCODER_DECODER = Flavour(
    ENCODER_DECODER_KIND,
    fits=lambda traced: traced.cache_layout is CacheLayout.ENCODER_DECODER,
    convert=encoder_decoder_models,
    verification=Verification(encoder_decoder_inputs, compare_tokens=compare_encoder_decoder),
    takes_texts=False,
)
