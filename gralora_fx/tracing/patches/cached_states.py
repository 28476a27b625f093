"""States of a cache while a model is traced: each update makes the next one, where transformers writes over the last.

So a graph takes a state and gives the next, and no input is changed by a run. Code that replaces a model's own asks
`cache.get_conv_state(layer)` or `cache.get_recurrent_state(layer)` for a state, as the model does, and hands the next
one to `cache.update_recurrent_state(next, layer)`, or to `keep_conv_state` where an operator has made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Cache

from gralora_fx.compat.transformers_caches import LinearAttentionLayer


def keep_conv_state(cache: Cache, state: Tensor, layer: int, number: int = 0) -> None:
    """Let a layer keep the next state of a convolution, which an operator has computed.

    Args:
        cache: The cache.
        state: `[batch, channels, kernel - 1]`, its last inputs.
        layer: The layer.
        number: Which state of the layer.
    """
    holder: Any = cache.layers[layer]
    holder.conv_states[number] = state


@contextmanager
def fresh_states() -> Iterator[None]:
    """Let updates of states give new tensors within the block."""
    with (
        patch.object(LinearAttentionLayer, "update_conv_state", _next_conv_state),
        patch.object(LinearAttentionLayer, "update_recurrent_state", _next_recurrent_state),
    ):
        yield


def _next_conv_state(layer: Any, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """What a convolution reads: the inputs that were kept and the new ones, of which the last are kept."""
    kept = layer.conv_states[state_idx]
    read = torch.cat([kept, conv_states], dim=-1)
    layer.conv_states[state_idx] = read[..., -kept.shape[-1] :]
    return read


def _next_recurrent_state(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states
