"""An encoder-decoder with a cache as two ONNX graphs in optimum's layout, which transformers.js reads too."""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from gralora_fx.exporters.adapters_as_data import DataSites
from gralora_fx.exporters.flavours.flavour import Flavour, Models, Request, note_rows
from gralora_fx.exporters.flavours.translated_passes import translated_passes
from gralora_fx.exporters.fx_passes.cast_graph import CastGraph, float32_inputs
from gralora_fx.exporters.fx_passes.match_attention import match_attention
from gralora_fx.exporters.fx_passes.split_encoder_decoder import split
from gralora_fx.exporters.onnx_passes.clean_up import drop_stack_traces
from gralora_fx.exporters.onnx_passes.cross_attention import cache_cross_attention
from gralora_fx.exporters.onnx_passes.data_adapters import insertion_passes
from gralora_fx.exporters.onnx_passes.normalization import match_rms_norms
from gralora_fx.exporters.onnx_passes.quantization import quantization_passes
from gralora_fx.exporters.onnx_passes.quantize import tables_of_heads
from gralora_fx.exporters.onnx_pipeline import OnnxPipeline
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verification.cases import Verification
from gralora_fx.exporters.verification.encoder_decoder_inputs import drop_padding, encoder_decoder_inputs
from gralora_fx.exporters.verification.seq2seq_tokens import compare_tokens
from gralora_fx.runtime.export_directory import DECODER, ENCODER, ENCODER_DECODER_KIND
from gralora_fx.runtime.manifest import RowsEntry
from gralora_fx.tracing.inputs.decoder_cache import CacheLayout


def encoder_decoder_models(request: Request) -> Models:
    """The two ONNX models of a traced encoder-decoder, by the names of their files.

    `encoder_model`: `input_ids` or `input_features`, `attention_mask` -> `last_hidden_state`.

    `decoder_model_merged`: `input_ids, encoder_hidden_states, encoder_attention_mask, use_cache_branch` and
    `past_key_values.N.decoder|encoder.key|value` -> `logits` of every position and
    `present.N.decoder|encoder.key|value`. If `use_cache_branch` is false the past is not read; if true, the keys and
    values of the encoder's output are taken from the past and passed through. What the decoder reads of the encoder is
    float32.

    Raises:
        ExportError: The graph cannot be split or cannot be expressed in ONNX.
    """
    options, log = request.options, request.log
    parts = split(request.graph_module)
    encoder = _translated("encoder", parts.encoder, CastGraph(options.precision), request)
    cast = CastGraph(options.precision, len(parts.outputs) - 1)
    decoder = _translated("decoder", parts.decoder, cast, request)
    encoder.graph.outputs[0].name = "last_hidden_state"
    pasts = [value for value in decoder.graph.inputs if str(value.name).startswith("past_key_values")]
    for index, value in enumerate(pasts):
        value.name = f"past_key_values.{index // 2}.decoder.{'value' if index % 2 else 'key'}"
    for value, name in zip(decoder.graph.outputs, parts.outputs, strict=True):
        value.name = name
    tables = frozenset(tables_of_heads(encoder) | tables_of_heads(decoder))
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        named_pipeline(name, options, tables, request.data).run(model, log)
    if request.data is not None:
        note_rows(
            RowsEntry(None, "rows of an encoder-decoder run one after the other, each with its adapter"), decoder, log
        )
    return {ENCODER: encoder, DECODER: decoder}


def _translated(name: str, graph_module: fx.GraphModule, cast: CastGraph, request: Request) -> ir.Model:
    first = [cast]  # casts are seen before anything is simplified
    model = translate(graph_module, match_rms_norms, match_attention, first=first, log=request.log, name=name)
    return translated_pipeline(name, request.options, request.data).run(model, request.log)


def translated_pipeline(name: str, options: ExportOptions, data: DataSites | None = None) -> OnnxPipeline:
    """What either part goes through as it was translated.

    Args:
        name: The part.
        options: The options of the export.
        data: The layers whose adapters are data of the models; None for none.
    """
    return OnnxPipeline(
        name,
        (
            *translated_passes(options, data, unless_weight),
            drop_stack_traces,
        ),
    )


def named_pipeline(
    name: str, options: ExportOptions, tables: frozenset[str], data: DataSites | None = None
) -> OnnxPipeline:
    """What a part goes through once its inputs and outputs have their names.

    Args:
        name: The part.
        options: The options of the export.
        tables: Names of embeddings that are a head's weight in either part.
        data: The layers whose adapters are data of the models; None for none.
    """
    return OnnxPipeline(
        name,
        (
            name_axes,
            *insertion_passes(
                data, quantized=options.quantization is not None
            ),  # what was fused stays fused; before the keys' projections move into a branch
            *([cache_cross_attention] if name == "decoder" else []),  # finds the cache by the names
            float32_inputs,  # so do those inputs that are not of the cache
            *quantization_passes(options.quantization, tables),  # last: all others look for matrices
        ),
    )


ENCODER_DECODER = Flavour(
    ENCODER_DECODER_KIND,
    fits=lambda traced: traced.cache_layout is CacheLayout.ENCODER_DECODER,
    convert=encoder_decoder_models,
    verification=Verification(encoder_decoder_inputs, drop_padding, compare_tokens=compare_tokens),
)
