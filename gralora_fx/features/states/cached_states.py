"""States of a cache while a model is traced: each update makes the next one, where transformers writes over the last.

So a graph takes a state and gives the next, and no input is changed by a run. Code that replaces a model's own asks
`cache.get_conv_state(layer)` or `cache.get_recurrent_state(layer)` for a state, as the model does, and hands the next
one to `cache.update_recurrent_state(next, layer)`, or to `ConvRead.keep` where an operator has made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gralora_fx.base.compat.transformers_models import LinearAttentionLayer


@dataclass
class ConvRead:
    """What a convolution reads of a layer's cache, which an operator takes apart.

    Attributes:
        joined: The inputs that were kept and the new ones, `[batch, channels, kept + length]`.
        kept: The former.
        new: The latter.
        layer: The layer of the cache.
        number: Which state of the layer.
    """

    joined: Tensor
    kept: Tensor
    new: Tensor
    layer: Any
    number: int

    def keep(self, state: Tensor) -> None:
        """Let the layer keep the next state, `[batch, channels, kernel - 1]`, which an operator has computed."""
        self.layer.conv_states[self.number] = state


_last: ContextVar[ConvRead | None] = ContextVar("the last read of a convolution", default=None)


def conv_read(joined: Tensor) -> ConvRead | None:
    """The read of a cache that gave a tensor, if it was the last one; None of any other tensor."""
    last = _last.get()
    return last if last is not None and last.joined is joined else None


@contextmanager
def fresh_states() -> Iterator[None]:
    """Let updates of states give new tensors within the block."""
    before = _last.set(None)
    try:
        with (
            patch.object(LinearAttentionLayer, "update_conv_state", _next_conv_state),
            patch.object(LinearAttentionLayer, "update_recurrent_state", _next_recurrent_state),
        ):
            yield
    finally:
        _last.reset(before)


def _next_conv_state(layer: Any, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """What a convolution reads: the inputs that were kept and the new ones, of which the last are kept."""
    kept = layer.conv_states[state_idx]
    read = torch.cat([kept, conv_states], dim=-1)
    layer.conv_states[state_idx] = read[..., -kept.shape[-1] :]
    _last.set(ConvRead(read, kept, conv_states, layer, state_idx))
    return read


def _next_recurrent_state(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states
