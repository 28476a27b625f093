"""Variants of a graph: without its cache, ending before the head, over rows that hold several texts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput

from gralora_fx.base.compat.torch_graphs import (
    convention_of,
    set_convention,
    tree_flatten,
    tree_info,
    tree_leaves,
    tree_unflatten,
)
from gralora_fx.core.adapters.adapter import ModelAdapter
from gralora_fx.core.graph.surgery import CountedGraph, copy_graph, erase_unused, overlay
from gralora_fx.core.operators.attention import Attention, Documents
from gralora_fx.core.tracing.inputs.cache import tensors_of
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError, option
from gralora_fx.format.cache_slots import keeps_state
from gralora_fx.format.input_names import IDS, PACKING, PAST

_MASK = "attention_mask"
_PACKED = f"rows that hold several texts (packing, padding_free) need {option(task='text-generation-with-past')}"


class RunForm(NamedTuple):
    """A variant of a graph: its outputs and extra inputs; the default is the graph itself."""

    keeps_cache: bool = True  # whether the cache is among the outputs; otherwise no keys and values are kept for it
    # the layer before which the graph ends, returning that layer's input; None to run all of it
    ends_at: str | None = None
    is_packed: bool = False  # whether the mask numbers the text of each token, and attention stays within a text
    takes_starts: bool = False  # whether an input gives the column from which an adapter acts


def check_head(traced: TracedModel, acting: Iterable[ModelAdapter]) -> str:
    """Return the language model's head; raise without one, or if an adapter of it would be left out of the loss."""
    head = traced.tree.output_embedding
    if head is None:
        raise RewriteError("the model's class names no language-model head, so a run cannot end before it")
    adapted = [adapter.name for adapter in acting if head in adapter.factors]
    if adapted:
        raise RewriteError(
            f"adapter {adapted[0]!r} adapts {head}, and a loss from the head's own weight would leave it out; take "
            f"{head} out of target_modules, or train it whole with modules_to_save=[{head!r}]"
        )
    return head


def form_of(
    traced: TracedModel, inputs: dict[str, Any], *, keeps_cache: bool, ends_at: str | None = None
) -> RunForm | None:
    """Return the graph variant that a call needs, or None for the graph itself; remove the inputs that choose it.

    A mask is added for rows that hold several texts. `keeps_cache` is the default of `use_cache`; the graph ends before
    the layer `ends_at`.
    """
    if PAST not in traced.input_names:
        _check_not_packed(inputs)
        if ends_at is not None:
            inputs.pop("use_cache", None)
        return None if ends_at is None else RunForm(keeps_cache=False, ends_at=ends_at)
    asked = inputs.pop("use_cache", None)
    returns_cache = getattr(traced.config, "use_cache", True) is not False if asked is None else bool(asked)
    is_packed = _number_texts(inputs, returns_cache=returns_cache)
    form = RunForm(keeps_cache and asked is not False and ends_at is None, ends_at, is_packed)
    return None if form == RunForm() else form


def _check_not_packed(inputs: Mapping[str, Any]) -> None:
    """Raise if an input marks several texts in a row, which a graph without a cache cannot keep apart."""
    if given := sorted(PACKING.intersection(inputs)):
        raise RewriteError(
            f"packed rows ({', '.join(given)}) hold several texts, which the attention of this graph does not keep "
            f"apart; trace the model with {option(task='text-generation-with-past')}, or set packing=False and "
            "padding_free=False"
        )


def _number_texts(inputs: dict[str, Any], *, returns_cache: bool) -> bool:
    """Add a mask of each token's text if positions show several in a row; return whether they do."""
    given = [inputs.pop(name) for name in PACKING if name in inputs]
    positions = inputs.get("position_ids")
    may_be_packed = inputs.get("attention_mask") is None and inputs.get(PAST) is None
    if positions is not None and may_be_packed and (given or not returns_cache):
        texts = texts_of(positions)
        if given or torch.compiler.is_compiling() or bool((texts > 1).any()):
            inputs["attention_mask"] = texts
            return True
    if given:
        raise RewriteError(
            "packed rows need position_ids that start again with each text, and neither an attention_mask nor a cache"
        )
    return False


def in_form(flat: fx.GraphModule, form: RunForm, traced: TracedModel) -> CountedGraph:
    """Return a variant of a flat graph, over the same tensors."""
    graph = copy_graph(flat)
    if form.takes_starts:
        from gralora_fx.core.adapters.acting_tokens import take_starts

        take_starts(graph)
    if form.is_packed:
        from gralora_fx.core.adapters.acting_tokens import check_not_packed

        check_not_packed(graph)
        _keep_texts_apart(graph, traced)
    if form.ends_at is not None:
        _return_only(graph, BaseModelOutput(last_hidden_state=_input_of(graph, form.ends_at, traced)))
    elif not form.keeps_cache:
        _return_only(graph, _without_cache(graph))
    graph.lint()
    return overlay(flat, graph, flat.training)


def texts_of(positions: Tensor) -> Tensor:
    """Return each token's text number in its row, from 1 on; a text starts where positions `[batch, length]` break."""
    return 1 + (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).long().cumsum(-1)


def _keep_texts_apart(graph: fx.Graph, traced: TracedModel) -> None:
    """Restrict attention to tokens of the same text.

    Before: `y = attention(query, key, value, mask)`
    After:  `m = documents(mask, length, window); y = attention(query, key, value, m)`, `m` once for all layers
    """
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    mask, ids = inputs.get(_MASK), inputs.get(IDS)
    past = traced.example_inputs.get(PAST)
    layers = list(Attention.all_in(graph))
    others = {
        user for user in (mask.users if mask is not None else ()) if user.target is not torch.ops.aten.sym_size.int
    }
    attends = isinstance(past, Cache) and not keeps_state(tensors_of(past))
    if mask is None or ids is None or not attends or others != {node for node, _ in layers}:
        raise RewriteError(
            f"{_PACKED}, and a model whose layers are all attention with a padding mask; set packing=False and "
            "padding_free=False"
        )
    made: dict[int, fx.Node] = {}
    with graph.inserting_after(next(reversed(inputs.values()))):
        length = graph.call_function(torch.ops.aten.sym_size.int, (ids, 1))
    for node, attention in layers:
        if attention.window not in made:
            with graph.inserting_after(length):
                made[attention.window] = Documents(mask, length, attention.window).insert(graph)
        replace(attention, mask=made[attention.window]).write(node)


def _input_of(graph: fx.Graph, path: str, traced: TracedModel) -> fx.Node:
    """Return the input node of a layer that the graph calls once."""
    calls = {call for site in traced.sites if site.path == path for call in site.calls}
    nodes = [node for node in graph.nodes if node.name in calls]
    if len(nodes) != 1 or not isinstance(nodes[0].args[0], fx.Node):
        raise RewriteError(f"{path} is not a layer that the graph calls once, so a run cannot end before it")
    return nodes[0].args[0]


def _without_cache(graph: fx.Graph) -> Any:
    """Return the graph's output nodes in the model's output class, without the cache."""
    outputs = tree_unflatten(tree_leaves(graph.output_node().args[0]), tree_info(graph).out_spec)
    return type(outputs)(**{name: value for name, value in outputs.items() if not isinstance(value, Cache)})


def _return_only(graph: fx.Graph, outputs: Any) -> None:
    """Replace a graph's outputs, and erase nodes that only computed the old ones."""
    leaves, spec = tree_flatten(outputs)
    output = graph.output_node()
    earlier = tree_leaves(output.args[0])
    output.args = (tuple(leaves),)
    convention = copy.copy(convention_of(graph))
    convention.pytree_info = tree_info(graph)._replace(out_spec=spec)
    set_convention(graph, convention)
    for node in earlier:
        if isinstance(node, fx.Node):
            erase_unused(graph, node)
