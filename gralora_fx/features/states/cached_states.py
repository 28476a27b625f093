"""States in transformers' caches: empty layers for them, and functional updates while a model is traced.

In a trace each update creates the next state, where transformers overwrites the last. So a graph takes a state and
returns the next, and no run changes an input. Code that replaces a model's own reads a state with
`cache.get_conv_state(layer)` or `cache.get_recurrent_state(layer)`, like the model, and stores the next one with
`cache.update_recurrent_state(next, layer)`, or with `ConvRead.keep` if an operator computed it.

MiniMax's cache keeps the states of lightning attention in a list beside its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gralora_fx.base.compat.transformers_models import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from gralora_fx.base.patches import patched_here
from gralora_fx.features.states.state_kinds import KINDS
from gralora_fx.format.cache_slots import CacheSlot

_BESIDE = KINDS["recurrent"].beside


def empty(like: DynamicCache) -> DynamicCache:
    """Return a cache without layers, of the model's own class if that keeps states beside them."""
    return type(like)() if hasattr(like, _BESIDE) else DynamicCache()


def fresh(cache: DynamicCache, index: int) -> Any:
    """Return an empty layer with as many states as a cache's layer; None if it keeps none."""
    beside = getattr(cache, _BESIDE, [])
    if index >= len(cache.layers) or isinstance((beside[index : index + 1] or [None])[0], Tensor):
        return LinearAttentionLayer()
    layer = cache.layers[index]
    if not isinstance(layer, LinearAttentionLayer):
        return None
    kind = LinearAttentionAndFullAttentionLayer if isinstance(layer, DynamicLayer) else LinearAttentionLayer
    return kind(number_of_states=layer.number_of_states)


def keep(cache: Any, slot: CacheSlot, state: Tensor) -> None:
    """Store a state in a cache that has a layer for it."""
    if hasattr(cache, _BESIDE):
        cache.set_linear_cache(slot.layer, state)
        return
    layer = cache.layers[slot.layer]
    getattr(layer, slot.kind.attribute)[slot.number] = state
    getattr(layer, f"is_{slot.kind.attribute}_initialized")[slot.number] = True
    layer.has_previous_state[slot.number] = True
    if slot.kind.is_window:
        layer.conv_kernel_size[slot.number] = state.shape[-1]
        layer.device = state.device  # no dtype, so that a run in another precision takes the same form


@contextmanager
def longer_states(model: nn.Module) -> Iterator[set[tuple[int, int]]]:
    """Record, within the block, which convolution states keep one input more than the next step reads."""
    longer: set[tuple[int, int]] = set()
    running: list[nn.Conv1d] = []  # the convolutions of the modules that run, the innermost last
    update = DynamicCache.update_conv_state

    def noted(cache: Any, states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Tensor:
        width, convolution = options.get("conv_kernel_size"), running[-1] if running else None
        if convolution is not None and convolution.kernel_size == (width,) and convolution.dilation == (1,):
            longer.add((layer_idx, state_idx))
        kept: Tensor = update(cache, states, layer_idx, state_idx=state_idx, **options)
        return kept

    with ExitStack() as undone:
        undone.enter_context(patched_here(DynamicCache, "update_conv_state", noted))
        for module in model.modules():
            own = [part for part in module.children() if isinstance(part, nn.Conv1d)]
            if len(own) == 1:
                before = module.register_forward_pre_hook(lambda *_, own=own: running.extend(own))
                after = module.register_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True)
                undone.callback(before.remove)
                undone.callback(after.remove)
        yield longer


@dataclass
class ConvRead:
    """A convolution's read of a layer's cache, for an operator that takes its parts."""

    joined: Tensor  # the kept inputs and the new ones, `[batch, channels, kept + length]`
    kept: Tensor  # the kept inputs
    new: Tensor  # the new inputs
    layer: Any  # the layer of the cache
    number: int  # index of the state in the layer

    def keep(self, state: Tensor) -> None:
        """Store the next state, `[batch, channels, kernel - 1]`, that an operator computed."""
        self.layer.conv_states[self.number] = state


_last: ContextVar[ConvRead | None] = ContextVar("the last read of a convolution", default=None)


def conv_read(joined: Tensor) -> ConvRead | None:
    """Return the cache read that produced a tensor, if it was the last one; None for other tensors."""
    last = _last.get()
    return last if last is not None and last.joined is joined else None


@contextmanager
def fresh_states() -> Iterator[None]:
    """Let updates of states return new tensors while the block runs."""
    before = _last.set(None)
    try:
        with (
            patched_here(LinearAttentionLayer, "update_conv_state", _next_conv_state),
            patched_here(LinearAttentionLayer, "update_recurrent_state", _next_recurrent_state),
        ):
            yield
    finally:
        _last.reset(before)


def _next_conv_state(layer: Any, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """Return a convolution's input: the kept inputs and the new ones; the last of them are kept."""
    kept = layer.conv_states[state_idx]
    read = torch.cat([kept, conv_states], dim=-1)
    layer.conv_states[state_idx] = read[..., -kept.shape[-1] :]
    _last.set(ConvRead(read, kept, conv_states, layer, state_idx))
    return read


def _next_recurrent_state(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states
