"""Kinds of states in a cache, and the exported operators that read them."""

from __future__ import annotations

from gralora_fx.format.cache_slots import StateKind

KINDS = {
    # [batch, channels, kernel - 1], the last inputs of a causal convolution
    "conv": StateKind("conv", "conv_states", is_window=True),
    # [batch, heads, ...], what a recurrence has summed up; MiniMax's cache has it beside its layers
    "recurrent": StateKind("recurrent", "recurrent_states", sums_up=True, beside="linear_cache"),
}
# operators, and the input of each that may share its memory with an output
READERS = {("CausalConvWithState", 3), ("LinearAttention", 3)}
