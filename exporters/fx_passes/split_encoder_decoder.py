"""The encoder and the decoder of a graph that holds both, apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from transformers import EncoderDecoderCache

from gralora_fx.compat import pytree
from gralora_fx.compat.calling_convention import tree_info
from gralora_fx.errors import ExportError
from gralora_fx.tracing.inputs.decoder_cache import PAST

_DECODER_PREFIXES = ("decoder_", PAST)


@dataclass(frozen=True)
class EncoderDecoder:
    """A graph in two parts.

    Attributes:
        encoder: From the model's own input to `last_hidden_state`.
        decoder: From `input_ids`, `encoder_hidden_states`, the masks that it reads, and past keys and values of its own
            positions, to `logits`, keys and values of its own positions, and those of the encoder's output.
        outputs: Names of the decoder's outputs: `logits` and `present.N.decoder|encoder.key|value`.
    """

    encoder: fx.GraphModule
    decoder: fx.GraphModule
    outputs: tuple[str, ...]


def split(graph_module: fx.GraphModule) -> EncoderDecoder:
    """Take a traced encoder-decoder apart at the encoder's output.

    Before: `logits, keys and values, hidden = forward(input_ids, attention_mask, decoder_input_ids, past)`
    After:  `hidden = encoder(input_ids, attention_mask)` and
            `logits, keys and values = decoder(input_ids, encoder_hidden_states, encoder_attention_mask, past)`

    Args:
        graph_module: A graph traced with a cache, in evaluation mode; it is left as it is.

    Raises:
        ExportError: The graph does not give the encoder's output, or the decoder reads more of the encoder than that.
    """
    graph = graph_module.graph
    results: Any = graph.output_node().args[0]
    spec = tree_info(graph).out_spec
    outputs = pytree.tree_unflatten(results, spec)
    hidden, cache = outputs.get("encoder_last_hidden_state"), outputs.get(PAST)
    if not isinstance(hidden, fx.Node) or not isinstance(cache, EncoderDecoderCache):
        raise ExportError("the trace gives no encoder_last_hidden_state with a cache; trace it with a -with-past task")
    own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
    if len(own) != len(cross):
        raise ExportError(f"the decoder has {len(own)} layers with a cache of its own and {len(cross)} of the encoder")
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    decoder_inputs = {name: node for name, node in placeholders.items() if name.startswith(_DECODER_PREFIXES)}
    encoder_inputs = {name: node for name, node in placeholders.items() if name not in decoder_inputs}
    encoder = _part(graph_module, encoder_inputs, {"last_hidden_state": hidden})
    past = {name: node for name, node in decoder_inputs.items() if name.startswith(PAST)}
    given = {name.removeprefix("decoder_"): node for name, node in decoder_inputs.items() if name not in past}
    given |= {f"encoder_{name}": node for name, node in encoder_inputs.items() if name.endswith("mask")}
    given |= {"encoder_hidden_states": hidden, **past}
    named = {"logits": outputs["logits"]}
    for index, layers in enumerate(zip(own, cross, strict=True)):
        for part, layer in zip(("decoder", "encoder"), layers, strict=True):
            named |= {f"present.{index}.{part}.key": layer.keys, f"present.{index}.{part}.value": layer.values}
    decoder = _part(graph_module, given, named)
    return EncoderDecoder(encoder, decoder, tuple(named))


def _part(
    graph_module: fx.GraphModule, inputs: Mapping[str, fx.Node], outputs: Mapping[str, fx.Node]
) -> fx.GraphModule:
    """The part of a graph between inputs and outputs, which reads every size from its own inputs.

    Args:
        graph_module: The whole graph.
        inputs: Nodes that become placeholders, by their names; those that nothing reads are left out.
        outputs: Nodes to return, by name.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for name, node in inputs.items():
        made[node] = graph.placeholder(name)
        made[node].meta = dict(node.meta)
    sizes = {
        str(size): (placeholder, axis)
        for placeholder in reversed(list(made.values()))
        for axis, size in enumerate(placeholder.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    needed = _reached(outputs.values(), stop=set(made), sizes=sizes)
    for node in graph_module.graph.nodes:
        if node not in needed or node in made:
            continue
        size = sizes.get(str(node.meta.get("val"))) if _is_size(node) else None
        if size is not None:
            made[node] = graph.call_function(torch.ops.aten.sym_size.int, size)
            made[node].meta = dict(node.meta)
        elif node.op == "placeholder":
            known = ", ".join(inputs)
            raise ExportError(f"{', '.join(outputs)} depends on {node.target} by more than {known}; it cannot be split")
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs.values()))
    for placeholder in graph.find_nodes(op="placeholder"):
        if not placeholder.users:
            graph.erase_node(placeholder)
    graph.lint()
    return fx.GraphModule(graph_module, graph)


def _reached(outputs: object, *, stop: set[fx.Node], sizes: Mapping[str, tuple[fx.Node, int]]) -> set[fx.Node]:
    """Every node that outputs are made of, not looking behind the given nodes and known sizes."""
    found: set[fx.Node] = set()
    waiting = list(outputs)  # type: ignore[call-overload]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node not in stop and not (_is_size(node) and str(node.meta["val"]) in sizes):
            waiting.extend(node.all_input_nodes)
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)
