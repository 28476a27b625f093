"""An encoder-decoder with a cache as two ONNX graphs in optimum's layout, which transformers.js reads too."""

from __future__ import annotations

import onnx_ir as ir
from torch import fx
from transformers import EncoderDecoderCache

from gralora_fx.exporters.flavours.flavour import Exported, Flavour
from gralora_fx.exporters.fx_passes.cast_graph import in_precision
from gralora_fx.exporters.fx_passes.split_encoder_decoder import split
from gralora_fx.exporters.onnx_passes.clean_up import FoldConstants, drop_stack_traces, remove_unused_nodes
from gralora_fx.exporters.onnx_passes.cross_attention import take_cached
from gralora_fx.exporters.onnx_passes.fold_transposes import fold_transposes
from gralora_fx.exporters.onnx_passes.normalization import lower_norms, mark_rms_norms
from gralora_fx.exporters.pipeline import PassLog, Pipeline
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.runtime.names import DECODER, ENCODER
from gralora_fx.tracing.inputs.decoder_cache import PAST


def encoder_decoder_models(graph_module: fx.GraphModule, precision: str, log: PassLog) -> dict[str, ir.Model]:
    """The two ONNX models of a traced encoder-decoder, by the names of their files.

    `encoder_model`: `input_ids` or `input_features`, `attention_mask` -> `last_hidden_state`.

    `decoder_model_merged`: `input_ids, encoder_hidden_states, encoder_attention_mask, use_cache_branch` and
    `past_key_values.N.decoder|encoder.key|value` -> `logits` of every position and
    `present.N.decoder|encoder.key|value`. Without `use_cache_branch` the past is not read; with it, keys and values of
    the encoder's output are those of the past, and given on.

    Args:
        graph_module: A graph traced with a cache, without adapters, in evaluation mode.
        precision: Precision of weights, activations and the cache (see `precision`); what the decoder reads of the
            encoder is float32.
        log: Gets a report for each pass.

    Raises:
        ExportError: The graph cannot be split or has no ONNX form.
    """
    parts = split(graph_module)
    encoder = _translated("encoder", in_precision(parts.encoder, precision), log)
    decoder = _translated("decoder", in_precision(parts.decoder, precision, kept=len(parts.outputs) - 1), log)
    encoder.graph.outputs[0].name = "last_hidden_state"
    pasts = [value for value in decoder.graph.inputs if str(value.name).startswith("past_key_values")]
    for index, value in enumerate(pasts):
        value.name = f"past_key_values.{index // 2}.decoder.{'value' if index % 2 else 'key'}"
    for value, name in zip(decoder.graph.outputs, parts.outputs, strict=True):
        value.name = name
    Pipeline("encoder", (name_axes,)).run(encoder, log)
    Pipeline("decoder", (name_axes, take_cached)).run(decoder, log)  # the cache goes by the names
    return {ENCODER: encoder, DECODER: decoder}


def _translated(name: str, graph_module: fx.GraphModule, log: PassLog) -> ir.Model:
    model = translate(graph_module, mark_rms_norms, log=log, name=name)
    return Pipeline(
        name,
        (
            fold_transposes,  # first: what folds constants would compute the transposes of weights
            lower_norms,
            FoldConstants(unless_weight),
            remove_unused_nodes,
            drop_stack_traces,
        ),
    ).run(model, log)


ENCODER_DECODER = Flavour(
    "encoder-decoder",
    fits=lambda traced: isinstance(traced.example_inputs.get(PAST), EncoderDecoderCache),
    convert=lambda request: Exported(encoder_decoder_models(request.graph_module, request.precision, request.log)),
)
