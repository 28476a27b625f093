"""Rotary embeddings that a trace of a decoder's step recognises by their code; copies in other models are too."""

from __future__ import annotations

from functools import partial

from gralora_fx.core.tracing.known_code import Recognised

_rotary = partial(
    Recognised, "llama.modeling_llama:LlamaRotaryEmbedding.forward", ending="RotaryEmbedding", folder=__package__
)
STEP_CODE = (
    _rotary("traced_rotary:switched", fits=lambda module: module.rope_type == "longrope"),
    _rotary("traced_rotary:unscaled", fits=lambda module: module.rope_type == "dynamic"),
)
