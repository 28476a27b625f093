"""An encoder-decoder with a cache as two ONNX graphs in optimum's layout, which transformers.js reads too."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from torch import fx

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.kinds.flavour import (
    Flavour,
    Models,
    insertion_passes,
    note_rows,
    noting_passes,
    storing_passes,
    translated_passes,
)
from gralora_fx.exporters.rules.attention.match_attention import match_attention
from gralora_fx.exporters.rules.builder import add_initializer
from gralora_fx.exporters.rules.clean_up import drop_stack_traces
from gralora_fx.exporters.rules.normalization import match_rms_norms
from gralora_fx.exporters.rules.onnx_pipeline import OnnxPipeline
from gralora_fx.exporters.rules.rows.graph_inputs import float32_inputs
from gralora_fx.exporters.translation.cast_graph import CastGraph
from gralora_fx.exporters.translation.export_graphs import graph_to_translate, split
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verify.cases import Verification
from gralora_fx.exporters.verify.encoder_decoders import compare_encoder_decoder, encoder_decoder_inputs
from gralora_fx.format.cache_slots import KINDS
from gralora_fx.format.export_directory import DECODER, ENCODER, ENCODER_DECODER_KIND, FLAG
from gralora_fx.format.manifest import RowsEntry

_EVERYTHING = 2**63 - 1


def encoder_decoder_models(conversion: Conversion) -> Models:
    """The two ONNX models of a traced encoder-decoder, by the names of their files.

    `encoder_model`: `input_ids` or `input_features`, `attention_mask` -> `last_hidden_state`.

    `decoder_model_merged`: `input_ids, encoder_hidden_states, encoder_attention_mask, use_cache_branch` and
    `past_key_values.N.decoder|encoder.key|value` -> `logits` of every position and
    `present.N.decoder|encoder.key|value`. If `use_cache_branch` is false the past is not read; if true, the keys and
    values of the encoder's output are taken from the past and passed through. What the decoder reads of the encoder is
    float32.
    """
    precision, log = conversion.options.precision, conversion.log
    parts = split(graph_to_translate(conversion.traced))
    encoder = _translated(conversion, "encoder", parts.encoder, CastGraph(precision))
    kinds = (KINDS["key"],) * (len(parts.outputs) - 1)
    decoder = _translated(conversion, "decoder", parts.decoder, CastGraph(precision, kinds))
    encoder.graph.outputs[0].name = "last_hidden_state"
    pasts = [value for value in decoder.graph.inputs if str(value.name).startswith("past_key_values")]
    for index, value in enumerate(pasts):
        value.name = f"past_key_values.{index // 2}.decoder.{'value' if index % 2 else 'key'}"
    for value, name in zip(decoder.graph.outputs, parts.outputs, strict=True):
        value.name = name
    tables = _tables(conversion, encoder, decoder)
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        named_pipeline(conversion, name, tables).run(model, log)
    if conversion.adapters is not None:
        note_rows(
            RowsEntry(None, "rows of an encoder-decoder run one after the other, each with its adapter"), decoder, log
        )
    return {ENCODER: encoder, DECODER: decoder}


def _translated(conversion: Conversion, name: str, graph_module: fx.GraphModule, cast: CastGraph) -> ir.Model:
    first = [cast]  # casts are seen before anything is simplified
    passes = (match_rms_norms, match_attention, *noting_passes(conversion))
    model = translate(graph_module, *passes, first=first, log=conversion.log, name=name)
    return translated_pipeline(conversion, name).run(model, conversion.log)


def translated_pipeline(conversion: Conversion, name: str) -> OnnxPipeline:
    """What either part goes through as it was translated."""
    return OnnxPipeline(
        name,
        (
            *translated_passes(conversion, unless_weight),
            drop_stack_traces,
        ),
    )


def _tables(conversion: Conversion, *parts: ir.Model) -> frozenset[str]:
    """Return the names of embeddings that are a head's weight in some part, where weights are quantized."""
    if conversion.plan is None:
        return frozenset()
    from gralora_fx.exporters.rules.products.block_products import tables_of_heads

    return frozenset().union(*map(tables_of_heads, parts))


def named_pipeline(conversion: Conversion, name: str, tables: frozenset[str]) -> OnnxPipeline:
    """What a part goes through once its inputs and outputs have their names."""
    return OnnxPipeline(
        name,
        (
            name_axes,
            *insertion_passes(
                conversion
            ),  # what was fused stays fused; before the keys' projections move into a branch
            *([cache_cross_attention] if name == "decoder" else []),  # finds the cache by the names
            float32_inputs,  # so do those inputs that are not of the cache
            *storing_passes(conversion, tables),  # last: all others look for matrices
        ),
    )


def cache_cross_attention(model: ir.Model) -> PassResult[ir.Model]:
    """Take the cross-attention keys and values from the past, once there are any.

    Before: `present.N.encoder.key = Transpose(Reshape(MatMul(encoder_hidden_states, w)))`
    After:  `present.N.encoder.key = If(use_cache_branch)`, one branch of which is `past_key_values.N.encoder.key`, the
        other the computation from before; the decoder's own past is cut to nothing where the flag is false
    """
    graph = model.graph
    flag = ir.Value(name=FLAG, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    outputs = {str(value.name): value for value in graph.outputs}
    layers = sum(name.endswith(".encoder.key") for name in outputs)
    decoder_pasts = {str(value.name): value for value in graph.inputs if str(value.name).startswith("past_key_values.")}
    _read_past_if(graph, flag, decoder_pasts.values())
    others = [value for value in graph.inputs if value not in decoder_pasts.values()]
    pasts: list[ir.Value] = []
    for index in range(layers):
        names = [f"{index}.encoder.{kind}" for kind in ("key", "value")]
        pair = [outputs[f"present.{name}"] for name in names]
        cached = [_past_like(value, f"past_key_values.{name}") for name, value in zip(names, pair, strict=True)]
        _choose(graph, flag, cached, pair)
        pasts += [decoder_pasts[f"past_key_values.{index}.decoder.{kind}"] for kind in ("key", "value")] + cached
    graph.inputs[:] = [*others, *pasts, flag]
    graph.sort()
    return PassResult(2 * layers)


def _read_past_if(graph: ir.Graph, flag: ir.Value, pasts: Iterable[ir.Value]) -> None:
    """Slice past keys and values to length 0 if the flag is false, whatever was passed for them."""
    numbers = [_constant(graph, f"past.{number}", number) for number in (0, 2, _EVERYTHING)]
    nothing, axis, everything = numbers
    end = ir.node("Where", [flag, everything, nothing])
    nodes = [end]
    for past in pasts:
        slice_node = ir.node("Slice", [past, nothing, end.outputs[0], axis])
        value = slice_node.outputs[0]
        value.shape, value.type, value.name = past.shape, past.type, f"{past.name}.read"
        ir.convenience.replace_all_uses_with(past, value)
        slice_node.replace_input_with(0, past)
        assert past.shape is not None
        past.shape = ir.Shape([*past.shape[:2], "past_decoder_sequence_length", past.shape[3]])
        nodes.append(slice_node)
    graph.insert_before(graph[0], nodes)


def _choose(graph: ir.Graph, flag: ir.Value, cached: list[ir.Value], computed: list[ir.Value]) -> None:
    """Put `If(flag)` between values and their readers; nodes that only they need move into its branch."""
    moved = _only_for(graph, computed)
    chosen = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in computed]
    for old, new in zip(computed, chosen, strict=True):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = f"{old.name}.computed"
    graph.remove(moved)
    same = [ir.node("Identity", [value]) for value in cached]
    for node, value in zip(same, computed, strict=True):
        result = node.outputs[0]
        result.name, result.shape, result.type = str(value.name).replace("computed", "cached"), value.shape, value.type
    branches = {
        "then_branch": ir.Graph([], [node.outputs[0] for node in same], nodes=same, name="cached"),
        "else_branch": ir.Graph([], computed, nodes=moved, name="computed"),
    }
    attributes = [ir.AttrGraph(name, branch) for name, branch in branches.items()]
    graph.append(ir.Node("", "If", [flag], attributes, outputs=chosen))


def _only_for(graph: ir.Graph, values: list[ir.Value]) -> list[ir.Node]:
    """The nodes that nothing but these values needs, in order."""
    needed: set[ir.Node] = {producer for value in values if (producer := value.producer()) is not None}
    for node in reversed(graph):
        users = {user for output in node.outputs for user, _ in output.uses()}
        if users and users <= needed and not any(output.is_graph_output() for output in node.outputs):
            needed.add(node)
    return [node for node in graph if node in needed]


def _past_like(value: ir.Value, name: str) -> ir.Value:
    assert value.shape is not None
    shape = ir.Shape([*value.shape[:2], "past_encoder_sequence_length", value.shape[3]])
    return ir.Value(name=name, shape=shape, type=value.type)


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    return add_initializer(graph, ir.tensor([number], dtype=ir.DataType.INT64, name=name))


ENCODER_DECODER = Flavour(
    ENCODER_DECODER_KIND,
    convert=encoder_decoder_models,
    verification=Verification(encoder_decoder_inputs, compare_tokens=compare_encoder_decoder),
    takes_texts=False,
)
