"""The graphs that onnxruntime-genai and transformers.js run around images, over the weights of `model.onnx`.

input_ids                              --embed_tokens-->          inputs_embeds   (transformers.js)
input_ids, image_features              --embedding-->             inputs_embeds   (onnxruntime-genai)
inputs_embeds, attention_mask, cache   --decoder_model_merged-->  logits, cache   (both)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from gralora_fx.errors import ExportError
from gralora_fx.exporters.rules.builder import Builder, add_input
from gralora_fx.exporters.rules.clean_up import remove_unused_nodes
from gralora_fx.features.images.tasks_and_inputs import GRID, GRID_THW, IMAGE_FEATURES, IMAGES, NEWLINE, VISION_ENCODER
from gralora_fx.format.adapter_inputs import is_adapter_tensor
from gralora_fx.format.export_directory import MODEL
from gralora_fx.format.input_names import EMBEDS, IDS, beside_ids

DECODER, EMBED_TOKENS, EMBEDDING = "decoder_model_merged", "embed_tokens", "embedding"
_POSITIONS = "position_ids"


def program_graphs(config: Any, models: Mapping[str, ir.Model]) -> dict[str, ir.Model]:
    """Return the graphs that other programs run, by file name; none for models that these programs cannot drive.

    Such models have more of images in their texts than embeddings, adapters that must be given, or pixels or features
    in a form that the programs do not make.
    """
    if MODEL not in models:  # of an encoder-decoder
        return {}
    model, token = models[MODEL], image_token(config)
    names = [str(value.name) for value in model.graph.inputs]
    takes_adapters = any(is_adapter_tensor(name) and name not in model.graph.initializers for name in names)
    if token is None or takes_adapters or not beside_ids(names).keys() <= {EMBEDS, GRID}:
        return {}
    if not _is_known(models[VISION_ENCODER].graph):
        return {}
    table = _of_ids(model)
    return {DECODER: _of_embeddings(model), EMBED_TOKENS: table, EMBEDDING: _with_features(table, token)}


def _is_known(reader: ir.Graph) -> bool:
    """Return whether the programs know how to call the vision encoder: tiles, or patches with their grid."""
    pixels = next(value for value in reader.inputs if value.name == IMAGES)
    names = {value.name for value in (*reader.inputs, *reader.outputs)}
    assert pixels.shape is not None
    return GRID_THW in names or (len(pixels.shape) == 4 and NEWLINE not in names)


def image_token(config: Any) -> int | None:
    """Return the id that stands for a token of an image."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if isinstance(token, int)), None)


def _of_embeddings(model: ir.Model) -> ir.Model:
    """Return a decoder that takes the embeddings of all tokens.

    Before: `x = Where(input_ids < 0, inputs_embeds, Gather(table, input_ids))`, `inputs_embeds` may be left out
    After:  `x = inputs_embeds`, and `position_ids [3, batch, length]` where images have positions of their own
    """
    model = _copy(model)
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    embeds, ids = inputs[EMBEDS], inputs[IDS]
    chosen = _choice(model)
    assert chosen.inputs[1] is not None
    chosen.outputs[0].replace_all_uses_with(chosen.inputs[1])
    build = Builder(graph)
    for name in {EMBEDS, GRID} & inputs.keys():
        _require(graph, inputs[name])
    absent = build("Expand", build("Constant", value=ir.tensor([[-1]])), build("Shape", embeds, start=0, end=2))
    absent.shape, absent.type = ids.shape, ids.type
    ids.replace_all_uses_with(absent)  # of which a graph reads the shape
    graph.inputs.remove(ids)
    if (grid := inputs.get(GRID)) is not None:
        first = build("Gather", grid, build.scalar(0), axis=0)
        first.shape, first.type = inputs[_POSITIONS].shape, grid.type
        inputs[_POSITIONS].replace_all_uses_with(first)  # read where a position of an image is absent
        graph.inputs.remove(inputs[_POSITIONS])
        grid.name = _POSITIONS
    build.insert_before(graph[0])
    remove_unused_nodes(model)
    return model


def _require(graph: ir.Graph, value: ir.Value) -> None:
    """Make an input that may be left out one that has to be given, of the size that it has."""
    graph.initializers.pop(str(value.name))
    value.const_value = None
    (usage,) = value.uses()
    usage.node.outputs[0].replace_all_uses_with(value)


def _of_ids(model: ir.Model) -> ir.Model:
    """Return what makes embeddings of ids: the part of a decoder that it leaves where embeddings are given."""
    model = _copy(model)
    graph = model.graph
    own = _choice(model).inputs[2]
    assert own is not None
    build = Builder(graph)
    embeds = build("Cast", own, to=ir.DataType.FLOAT)
    embeds.name, embeds.shape, embeds.type = f"{EMBEDS}_of_ids", own.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.extend(build.take())
    graph.outputs[:] = [embeds]
    ids = next(value for value in graph.inputs if value.name == IDS)
    for value in graph.inputs:
        graph.initializers.pop(str(value.name), None)
    graph.inputs[:] = [ids]
    remove_unused_nodes(model)
    embeds.name = EMBEDS
    return model


def _with_features(table: ir.Model, token: int) -> ir.Model:
    """Return the graph that puts features in place of an image's tokens, in order; without any, tokens stay.

    Before: `inputs_embeds = table(input_ids)`
    After:  `inputs_embeds = ScatterND(table(input_ids), where input_ids == token, image_features)`
    """
    model = _copy(table)
    graph = model.graph
    (ids,), (own,) = graph.inputs, graph.outputs
    assert own.shape is not None
    features = add_input(graph, IMAGE_FEATURES, ir.DataType.FLOAT, ["image_tokens", own.shape[2]])
    build = Builder(graph)
    is_image = build("Equal", ids, build("Constant", value=ir.tensor([[token]])))
    are_given = build("Greater", build("Shape", features, start=0, end=1), build.ints(0))
    places = build("Transpose", build("NonZero", build("And", is_image, are_given)), perm=[1, 0])
    embeds = build("ScatterND", own, places, features)
    own.name, embeds.name = f"{EMBEDS}_of_ids", EMBEDS
    embeds.shape, embeds.type = own.shape, own.type
    graph.extend(build.take())
    graph.outputs[:] = [embeds]
    return model


def _choice(model: ir.Model) -> ir.Node:
    """Return the node that takes embeddings where they are given, and those of ids elsewhere."""
    value: ir.Value | None = next(value for value in model.graph.inputs if value.name == EMBEDS)
    while value is not None:  # which is expanded, and cast where the model computes in half precision
        readers = {usage.node.op_type: usage.node for usage in value.uses()}
        if "Where" in readers:
            return readers["Where"]
        following = next((readers[kind] for kind in ("Expand", "Cast") if kind in readers), None)
        value = None if following is None else following.outputs[0]
    raise ExportError("the graph does not tell embeddings that are given from those of ids; trace the model again")


def _copy(model: ir.Model) -> ir.Model:
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy
