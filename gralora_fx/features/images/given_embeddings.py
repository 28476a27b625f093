"""Calls of a model that reads images, for a trace: without images, or with embeddings in place of their tokens."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_fx.base.patches import patched_here
from gralora_fx.core.tracing.inputs.cache import positions
from gralora_fx.features.images.cross_attention import attending
from gralora_fx.features.images.image_inputs import deepstack_part, embedding_of
from gralora_fx.features.images.tasks_and_inputs import FEATURES, GRID, KEYS, PREFIX, SEEN, VALUES
from gralora_fx.format.input_names import EMBEDS, IDS, beside_ids


@contextmanager
def called_with_images(model: PreTrainedModel, names: Collection[str]) -> Iterator[None]:
    """Let a model take what images put beside ids, or know that there are none, within the block."""
    with ExitStack() as changed:
        changed.enter_context(_texts_alone(model))
        if beside := beside_ids(names):
            changed.enter_context(_given_embeddings(model, beside))
        yield


@contextmanager
def _texts_alone(model: PreTrainedModel) -> Iterator[None]:
    """Tell a model that caches images before texts, as GIT does, that there are none, by a wider padding mask."""
    with ExitStack() as changed:
        for part in model.modules():
            if isinstance(getattr(part, "image_patch_tokens", None), int):
                changed.enter_context(patch.object(part, "image_patch_tokens", 0))
        yield


@contextmanager
def _given_embeddings(model: PreTrainedModel, beside: Collection[str]) -> Iterator[None]:
    """Let a model take embeddings in place of some of its tokens, beside the ids, within the block.

    Where an id is negative, the embedding is the one that is given.

    Other readers of ids, such as the embeddings of each layer of Gemma 4, read the id of padding there, as for tokens
    of an image.
    """
    forward, embedding = model.forward, embedding_of(model)

    @functools.wraps(forward)
    def placed(*args: Any, **inputs: Any) -> Any:
        embeds = inputs.pop(EMBEDS, None)
        if embeds is None or inputs.get(IDS) is None:
            return forward(*args, **inputs, **({} if embeds is None else {EMBEDS: embeds}))
        ids, grid, features, prefix = (inputs[IDS], *(inputs.pop(name, None) for name in (GRID, FEATURES, PREFIX)))
        cross = [inputs.pop(name, None) for name in (KEYS, VALUES, SEEN)]
        given = ids < 0
        inputs[IDS] = torch.where(given, _stands_in(model), ids)
        if grid is not None:
            places = inputs.get("position_ids")
            counted = positions(inputs["attention_mask"], ids.shape[1]) if places is None else places
            inputs["position_ids"] = torch.where(grid < 0, counted, grid)
        with ExitStack() as changed:
            embed = _where_given(embedding.forward, given, embeds, inputs.get("decoder_input_ids"))
            changed.enter_context(patch.object(embedding, "forward", embed))
            if cross[0] is not None:
                inputs["cross_attention_states"] = cross[0]  # for which the layers are not skipped
                changed.enter_context(attending(model, *cross))
            if prefix is not None:
                _join(changed, model, prefix)
            if features is not None:
                _add_features(changed, deepstack_part(model), given, features)
            return forward(*args, **inputs)

    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    rest = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    more = [name for name in beside if name not in signature.parameters]
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
    placed.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(parameter for parameter in parameters if parameter not in rest), *own, *rest]
    )
    with patch.object(model, "forward", placed):
        yield


def _join(changed: ExitStack, model: PreTrainedModel, prefix: Tensor) -> None:
    """Let tokens of a prompt attend to each other in every step, where a model's code does in a first one alone."""
    code = sys.modules[type(model).__module__]
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        masked = functools.partial(getattr(code, name), block_sequence_ids=torch.where(prefix == 1, 0, -1))
        changed.enter_context(patched_here(code, name, masked))


def _stands_in(model: PreTrainedModel) -> int:
    """Return the id that layers which read ids see in place of an image."""
    text = model.config.get_text_config()
    return int(text.pad_token_id or 0) if text.model_type.startswith("gemma4") else 0


def _where_given(
    embed: Callable[..., Tensor], given: Tensor, embeds: Tensor, of_decoder: Tensor | None
) -> Callable[..., Tensor]:
    def embedded(ids: Tensor, *args: Any, **options: Any) -> Tensor:
        own = embed(ids, *args, **options)
        if ids is of_decoder or ids.ndim < given.ndim:
            return own
        return torch.where(given.unsqueeze(-1), embeds.to(own.dtype), own)

    return embedded


def _add_features(changed: ExitStack, part: Any, given: Tensor, features: Tensor) -> None:
    """Let a decoder add features of images after its first layers, which are zeros at every other position."""
    own = part.forward

    def told(*args: Any, **inputs: Any) -> Any:
        inputs |= {"visual_pos_masks": given, "deepstack_visual_embeds": list(features.unbind())}
        return own(*args, **inputs)

    def added(hidden_states: Tensor, _: Tensor, layer: Tensor) -> Tensor:
        return hidden_states + layer.to(hidden_states.dtype)

    changed.enter_context(patch.object(part, "forward", told))
    changed.enter_context(patch.object(part, "_deepstack_process", added))
