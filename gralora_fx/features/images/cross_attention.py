"""Layers of a decoder that attend to images beside the text, as those of Mllama (Llama 3.2 Vision) do.

Their keys and values depend on the images alone, so that what reads pixels computes them, once for an image:

    pixels -> tower -> projector -> k_proj, k_norm, v_proj of each such layer -> image_keys, image_values
    hidden states, image_keys, image_values, image_mask -> a layer -> hidden states; of text alone, the same ones
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_fx.features.images.tasks_and_inputs import KEYS, SEEN, VALUES

_SETS, _TILES = 2, 3  # of an example


def cross_layers(model: nn.Module) -> list[Any]:
    """Return a model's layers that attend to images, in order."""
    return [layer for layer in model.modules() if type(layer).__name__ == "MllamaCrossAttentionDecoderLayer"]


def reads_across(model: PreTrainedModel) -> bool:
    """Return whether layers of a model attend to images."""
    return getattr(model.config, "vision_config", None) is not None and bool(cross_layers(model))


def cross_examples(model: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw keys and values of two sets of images, and what tokens `[batch, length]` of some rows see of one."""
    layers = cross_layers(model)
    attention, patches = layers[0].cross_attn, model.model.vision_model.num_patches
    heads, size = attention.num_key_value_heads, attention.head_dim
    shape = (len(layers), _SETS, heads, size, _TILES, patches)
    keys, values = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
    return {KEYS: keys, VALUES: values.movedim(3, -1).contiguous(), SEEN: drawn_seen(ids, (_SETS, _TILES), generator)}


def drawn_seen(ids: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw what tokens `[batch, length]` see of sets of tiles, given both numbers: a row of none, a row of each set."""
    sets = sizes[0]
    seen = torch.randint(0, 2, (*ids.shape, *sizes), generator=generator)
    seen *= torch.randint(0, 2, (*ids.shape, 1, 1), generator=generator)
    of_row = torch.arange(ids.shape[0])[:, None] % (sets + 1) - 1
    return torch.where((of_row == torch.arange(sets))[:, None, :, None], seen, -1)


@contextmanager
def attending(model: PreTrainedModel, keys: Tensor, values: Tensor, seen: Tensor) -> Iterator[None]:
    """Let a model's layers attend to given keys and values within the block."""
    with ExitStack() as changed:
        for layer, own, read in zip(cross_layers(model), keys.unbind(), values.unbind(), strict=True):
            changed.enter_context(patch.object(layer, "forward", functools.partial(_attend, layer, own, read, seen)))
        yield


def _attend(layer: Any, keys: Tensor, values: Tensor, seen: Tensor, hidden_states: Tensor, **_: Any) -> Tensor:
    """Compute a layer as its own code does; a token that sees no tile attends to all of its row's images."""
    attention = layer.cross_attn
    batch, length = hidden_states.shape[:2]
    sets, heads, size, tiles, patches = keys.shape
    query = attention.q_proj(layer.input_layernorm(hidden_states)).view(batch, length, heads, -1, size)
    query = (attention.q_norm(query) * attention.scaling).permute(0, 2, 3, 1, 4)  # [batch, heads, group, length, size]
    scores = query.flatten(2, 3)[None] @ keys.flatten(3)[:, None]  # [sets, batch, heads, group * length, positions]
    is_seen = seen.movedim(2, 0)[:, :, None, None, :, :, None] > 0  # [sets, batch, 1, 1, length, tiles, 1]
    sees = is_seen.any(5, keepdim=True)
    hidden = torch.finfo(scores.dtype).min
    scores = scores.view(sets, batch, heads, -1, length, tiles, patches) + torch.where(sees & ~is_seen, hidden, 0.0)
    weights = scores.flatten(5).softmax(-1, dtype=torch.float32).to(values.dtype)
    found = weights.flatten(3, 4) @ values.flatten(2, 3)[:, None]
    found = found.view(sets, batch, heads, -1, length, size).permute(0, 1, 4, 2, 3, 5).flatten(3)
    is_own = (seen >= 0).any(3)  # [batch, length, sets]
    found = torch.where(is_own.movedim(2, 0)[..., None], found, 0.0).sum(0)
    attended = hidden_states + layer.cross_attn_attn_gate.tanh() * attention.o_proj(found)
    more = layer.mlp(layer.post_attention_layernorm(attended))
    more = torch.where((seen > 0).any(3).any(2, keepdim=True), more, 0.0)
    return torch.where(is_own.any(2, keepdim=True), attended + layer.cross_attn_mlp_gate.tanh() * more, hidden_states)
