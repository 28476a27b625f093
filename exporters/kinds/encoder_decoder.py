"""An encoder-decoder with a cache as two ONNX graphs in optimum's layout, which transformers.js reads too.

And its comparison with the model: the inputs, and the greedy tokens that the engine computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from gralora_fx.base.features import parts
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cache import returned_cache, tensors_of, with_tensors
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import Conversion
from gralora_fx.exporters.kinds.flavour import (
    Flavour,
    Models,
    insertion_passes,
    note_rows,
    noting_passes,
    storing_passes,
)
from gralora_fx.exporters.kinds.plain import translated_passes
from gralora_fx.exporters.rules.attention.attention_passes import match_attention
from gralora_fx.exporters.rules.builder import add_initializer
from gralora_fx.exporters.rules.clean_up import drop_stack_traces
from gralora_fx.exporters.rules.normalization import match_rms_norms
from gralora_fx.exporters.rules.onnx_pipeline import OnnxPipeline
from gralora_fx.exporters.rules.rows.graph_ends import float32_inputs
from gralora_fx.exporters.translation.export_graphs import CastGraph, graph_to_translate
from gralora_fx.exporters.translation.names import name_axes
from gralora_fx.exporters.translation.split_graph import split
from gralora_fx.exporters.translation.translate import translate
from gralora_fx.exporters.translation.weights import unless_weight
from gralora_fx.exporters.verify.cases import TokenResult, TokenRun, Verification, longest_text, pad, text_like
from gralora_fx.exporters.verify.greedy_tokens import EngineSteps, Step, engine_errors, greedy_steps
from gralora_fx.exporters.verify.outputs import run_model
from gralora_fx.exporters.verify_report import TensorCheck
from gralora_fx.format.cache_slots import KINDS
from gralora_fx.format.export_directory import DECODER, ENCODER, ENCODER_DECODER_KIND, FLAG
from gralora_fx.format.input_names import PAST, beside_ids
from gralora_fx.format.manifest import RowsEntry
from gralora_fx.run.engine.encoder_decoder import EncoderDecoder, Encodings
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize

_TOKENS, _QUICK_TOKENS = 8, 3
# rows, length of the text, side of its padding, positions before, new positions
_ENCODED_STEPS = (
    (1, 24, "", 0, 1),
    (1, 1, "", 0, 6),
    (3, 11, "right", 0, 4),
    (4, 6, "left", 9, 1),
    (1, 24, "", 24, 1),
    (3, 11, "right", 5, 3),
)
_QUICK_ENCODED_STEPS = ((1, 9, "", 0, 1), (2, 6, "right", 0, 3), (2, 5, "left", 4, 1))


def encoder_decoder_inputs(
    model: TracedModel, generator: torch.Generator, quick: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a decoder's first and later steps, over texts of several lengths, padded on either side."""
    limit = longest_text(model)
    for batch, source, side, past, length in _QUICK_ENCODED_STEPS if quick else _ENCODED_STEPS:
        if past + length > limit or source > limit:
            continue
        beside = beside_ids(model.example_inputs)
        example = {
            name: value
            for name, value in model.example_inputs.items()
            if isinstance(value, Tensor) and name not in beside
        }
        case: dict[str, Any] = {
            name: text_like(name, value, model, batch, length if name.startswith("decoder_") else source, generator)
            for name, value in example.items()
        }
        pad(case, side or "right")
        for examples in parts("step examples", beside):
            case |= examples.drawn_beside(model, case, generator)
        held = tensors_of(model.example_inputs[PAST])
        shapes = {slot: slot.kind.shape(tensor.shape, batch, past) for slot, tensor in held.items()}
        drawn = {slot: torch.randn(shape, generator=generator) for slot, shape in shapes.items()}
        case[PAST] = with_tensors(model.example_inputs[PAST], drawn)
        read = f"{batch} x {source}" if "input_ids" in case else f"{batch} inputs"
        padded = f" padded {side}" if side and "attention_mask" in case else ""
        yield f"{length} after {past} of {read}{padded}", case


def compare_encoder_decoder(run: TokenRun) -> TokenResult:
    """Compare an encoder-decoder's greedy tokens on the largest batch with an empty cache: all must be PyTorch's."""
    empty = [case for _, case in run.cases if PAST in case and not case[PAST].get_seq_length()]
    case = max(empty, key=lambda case: len(case["decoder_input_ids"]))
    source = {name: value for name, value in case.items() if name not in ("decoder_input_ids", PAST)}
    start, count = case["decoder_input_ids"][:, :1], _QUICK_TOKENS if run.quick else _TOKENS
    read = _answers_of_export(run, source, len(start), count)
    same = [
        step.logits.argmax(-1) == step.read_by(read).argmax(-1)
        for step in greedy_steps(_answers_of_model(run.model, source), start, torch.ones_like(start), count)
    ]
    share = float(torch.cat(same).float().mean())
    return TokenResult(share == 1.0, tensors=(TensorCheck("greedy tokens", 1.0 - share, 1.0 - share, share),))


def _answers_of_model(model: TracedModel | GraloraModel, source: Mapping[str, Any]) -> Step:
    cache: Any = None

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        nonlocal cache
        outputs = run_model(model, "greedy tokens", **source, decoder_input_ids=ids, past_key_values=cache)
        cache = returned_cache(outputs)
        logits: Tensor = outputs["logits"]
        return logits

    return read


def _answers_of_export(run: TokenRun, source: Mapping[str, Any], rows: int, count: int) -> Step:
    """Return the export in the engine that `generate` and the service use, with a row for each input of the encoder."""
    tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    arrays = {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in tensors.items()}
    limits = DecoderLimits(None, count, frozenset())
    with engine_errors("greedy tokens"):
        decoder = EncoderDecoder(run.session, run.adapters, limits, DecoderSize(rows), Encodings())
        opened = [
            decoder.open(source={name: array[row : row + 1] for name, array in arrays.items()}) for row in range(rows)
        ]
    return EngineSteps(decoder, opened, "greedy tokens")


_EVERYTHING = 2**63 - 1


def encoder_decoder_models(conversion: Conversion) -> Models:
    """Return the two ONNX models of a traced encoder-decoder, by the names of their files.

    `encoder_model`: `input_ids` or `input_features`, `attention_mask` -> `last_hidden_state`, in float32.

    `decoder_model_merged`: `input_ids, encoder_hidden_states, encoder_attention_mask, use_cache_branch` and
    `past_key_values.N.decoder|encoder.key|value` -> `logits` of every position and
    `present.N.decoder|encoder.key|value`. The past is not read if `use_cache_branch` is false; if true, the encoder's
    keys and values pass through.
    """
    precision, log = conversion.options.precision, conversion.log
    halves = split(graph_to_translate(conversion.traced))
    encoder = _translated(conversion, "encoder", halves.encoder, CastGraph(precision))
    kinds = (KINDS["key"],) * (len(halves.outputs) - 1)
    decoder = _translated(conversion, "decoder", halves.decoder, CastGraph(precision, kinds))
    encoder.graph.outputs[0].name = "last_hidden_state"
    pasts = [value for value in decoder.graph.inputs if str(value.name).startswith("past_key_values")]
    for index, value in enumerate(pasts):
        value.name = f"past_key_values.{index // 2}.decoder.{'value' if index % 2 else 'key'}"
    for value, name in zip(decoder.graph.outputs, halves.outputs, strict=True):
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
    """Return the passes over either part as translated."""
    return OnnxPipeline(name, (*translated_passes(conversion, unless_weight), drop_stack_traces))


def _tables(conversion: Conversion, *models: ir.Model) -> frozenset[str]:
    """Return the names of embeddings that are a head's weight in some part, if weights are quantized."""
    if conversion.plan is None:
        return frozenset()
    from gralora_fx.exporters.rules.products.block_products import tables_of_heads

    return frozenset().union(*map(tables_of_heads, models))


def named_pipeline(conversion: Conversion, name: str, tables: frozenset[str]) -> OnnxPipeline:
    """Return the passes over a part once its inputs and outputs have their names."""
    return OnnxPipeline(
        name,
        (
            name_axes,
            *insertion_passes(conversion),  # after all fusions; before the keys' projections move into a branch
            *([cache_cross_attention] if name == "decoder" else []),  # finds the cache by the names
            float32_inputs,  # casts the inputs other than the cache, found by name
            *(parts("optional inputs", conversion.traced.signature.inputs) if name == "encoder" else []),
            *storing_passes(conversion, tables),  # last: all other passes expect float matrices
        ),
    )


def cache_cross_attention(model: ir.Model) -> PassResult[ir.Model]:
    """Take the keys and values of cross-attention from the past, after the first step.

    Before: `present.N.encoder.key = Transpose(Reshape(MatMul(encoder_hidden_states, w)))`
    After:  `present.N.encoder.key = If(use_cache_branch)`, one branch of which is `past_key_values.N.encoder.key`, the
            other the computation from before; the decoder's own past is sliced to length 0 if the flag is false
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
    """Return the nodes that only these values depend on, in order."""
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
    has_companions=True,
)
