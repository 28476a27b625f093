"""Splitting of an encoder-decoder's graph at the encoder's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from transformers import EncoderDecoderCache

from gralora_fx.base.compat.torch_graphs import tree_info, tree_unflatten
from gralora_fx.core.tracing.inputs.cache import returned_cache
from gralora_fx.errors import ExportError
from gralora_fx.exporters.translation.matching import is_size
from gralora_fx.format.input_names import PAST

_DECODER_PREFIXES = ("decoder_", PAST)


@dataclass(frozen=True)
class SplitGraph:
    """A graph split in two."""

    encoder: fx.GraphModule  # from the model's own input to `last_hidden_state`
    # from `input_ids`, `encoder_hidden_states`, its masks, and past keys and values of its own positions, to `logits`,
    # keys and values of its own positions, and keys and values of the encoder's output
    decoder: fx.GraphModule
    outputs: tuple[str, ...]  # names of the decoder's outputs: `logits` and `present.N.decoder|encoder.key|value`


def split(graph_module: fx.GraphModule) -> SplitGraph:
    """Split a traced encoder-decoder at the encoder's output.

    Before: `logits, keys and values, hidden = forward(input_ids, attention_mask, decoder_input_ids, past)`
    After:  `hidden = encoder(input_ids, attention_mask)` and
            `logits, keys and values = decoder(input_ids, encoder_hidden_states, encoder_attention_mask, past)`
    """
    graph = graph_module.graph
    results: Any = graph.output_node().args[0]
    spec = tree_info(graph).out_spec
    outputs = tree_unflatten(results, spec)
    hidden, cache = outputs.get("encoder_last_hidden_state"), returned_cache(outputs)
    if not isinstance(hidden, fx.Node) or not isinstance(cache, EncoderDecoderCache):
        raise ExportError("the trace gives no encoder_last_hidden_state with a cache; trace it with a -with-past task")
    # a configuration may count the layers of another model, whose caches stay empty, as MBart's does in Donut
    own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
    self_layers, cross_layers = ([each for each in layers if each.keys is not None] for layers in (own, cross))
    if len(self_layers) != len(cross_layers):
        raise ExportError(
            f"the decoder has {len(self_layers)} layers with a cache of its own and {len(cross_layers)} of the encoder"
        )
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    decoder_inputs = {name: node for name, node in placeholders.items() if name.startswith(_DECODER_PREFIXES)}
    encoder_inputs = {name: node for name, node in placeholders.items() if name not in decoder_inputs}
    encoder = _part(graph_module, encoder_inputs, {"last_hidden_state": hidden})
    past = {name: node for name, node in decoder_inputs.items() if name.startswith(PAST)}
    decoder_feed = {name.removeprefix("decoder_"): node for name, node in decoder_inputs.items() if name not in past}
    decoder_feed |= {f"encoder_{name}": node for name, node in encoder_inputs.items() if name.endswith("mask")}
    decoder_feed |= {"encoder_hidden_states": hidden, **past}
    named_outputs = {"logits": outputs["logits"]}
    for index, layers in enumerate(zip(self_layers, cross_layers, strict=True)):
        for part, layer in zip(("decoder", "encoder"), layers, strict=True):
            named_outputs |= {f"present.{index}.{part}.key": layer.keys, f"present.{index}.{part}.value": layer.values}
    decoder = _part(graph_module, decoder_feed, named_outputs)
    return SplitGraph(encoder, decoder, tuple(named_outputs))


def _part(
    graph_module: fx.GraphModule, inputs: Mapping[str, fx.Node], outputs: Mapping[str, fx.Node]
) -> fx.GraphModule:
    """Return the subgraph between inputs and outputs, which reads every size from its own inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for name, node in inputs.items():
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    sizes = {
        str(size): (placeholder, axis)
        for placeholder in reversed(list(copies.values()))
        for axis, size in enumerate(placeholder.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    needed = _reached(outputs.values(), stop=set(copies), sizes=sizes)
    for node in graph_module.graph.nodes:
        if node not in needed or node in copies:
            continue
        size = sizes.get(str(node.meta.get("val"))) if is_size(node) else None
        if size is not None:
            copies[node] = graph.call_function(torch.ops.aten.sym_size.int, size)
            copies[node].meta = dict(node.meta)
        elif node.op == "placeholder":
            names = ", ".join(inputs)
            raise ExportError(f"{', '.join(outputs)} depends on {node.target} by more than {names}; it cannot be split")
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs.values()))
    for placeholder in graph.find_nodes(op="placeholder"):
        if not placeholder.users:
            graph.erase_node(placeholder)
    graph.lint()
    return fx.GraphModule(graph_module, graph)


def _reached(outputs: object, *, stop: set[fx.Node], sizes: Mapping[str, tuple[fx.Node, int]]) -> set[fx.Node]:
    """Return every node that the outputs depend on, stopping at the given nodes and known sizes."""
    reached: set[fx.Node] = set()
    waiting = list(outputs)  # type: ignore[call-overload]
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in stop and not (is_size(node) and str(node.meta["val"]) in sizes):
            waiting.extend(node.all_input_nodes)
    return reached
