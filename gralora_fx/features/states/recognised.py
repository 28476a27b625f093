"""The code by which a trace knows layers with a state: one row for each, by whose copies of it others are known too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from gralora_fx.core.tracing.patches.recognised import Recognised

SILU = ("silu", "swish")  # its names in configurations


def _has_gate(norm: Any) -> bool:
    return norm.activation in (*SILU, "sigmoid")


_row = partial(Recognised, folder=__package__)
CAUSAL_CONV = _row("qwen3_next.modeling_qwen3_next:causal_conv1d_fn", "recurrences:convolve")
DELTA_RULE = _row(
    "qwen3_next.modeling_qwen3_next:torch_chunk_gated_delta_rule", "recurrences:delta_rule", beside=("l2norm",)
)
KIMI_RULE = _row(
    "kimi_linear.modeling_kimi_linear:chunk_kimi_delta_attention", "recurrences:delta_rule", beside=("l2norm",)
)
LIGHTNING = _row(
    "minimax.modeling_minimax:MiniMaxLightningAttention.forward", "recurrences:lightning", ending="LightningAttention"
)
RECURRENCES = (CAUSAL_CONV, DELTA_RULE, KIMI_RULE, LIGHTNING)
_MIXERS = ("MambaMixer", "Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "FalconMambaMixer", "HybridMambaLayer")
STATE_SPACES = (
    _row("mamba2.modeling_mamba2:Mamba2Mixer.forward", "state_space_layers:mamba2", _MIXERS),
    _row("falcon_h1.modeling_falcon_h1:FalconH1Mixer.forward", "state_space_layers:mamba2", _MIXERS),
    _row("mamba.modeling_mamba:MambaMixer.forward", "state_space_layers:mamba", _MIXERS),
    _row("falcon_mamba.modeling_falcon_mamba:FalconMambaMixer.forward", "state_space_layers:mamba", _MIXERS),
    _row("jamba.modeling_jamba:JambaMambaMixer.forward", "state_space_layers:mamba", _MIXERS),
    _row("zamba.modeling_zamba:ZambaMambaMixer.forward", "state_space_layers:zamba", _MIXERS),
)
_SELECTIVE_SCANS = STATE_SPACES[2:]
_GATED = "RMSNormGated"
GATED_NORMS = (
    _row("mamba2.modeling_mamba2:MambaRMSNormGated.forward", "state_space_layers:norm_of_gated", _GATED),
    _row(
        "qwen3_next.modeling_qwen3_next:Qwen3NextRMSNormGated.forward",
        "state_space_layers:gate_of_normed",
        _GATED,
        fits=_has_gate,
    ),
    _row(
        "kimi_linear.modeling_kimi_linear:KimiLinearRMSNormGated.forward",
        "state_space_layers:gate_of_normed",
        _GATED,
        fits=_has_gate,
    ),
)
KNOWN_CODE = (*RECURRENCES, *STATE_SPACES, *GATED_NORMS)


@contextmanager
def with_fresh_states(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let a step's updates of states give new tensors within the block, if its cache has states."""
    from gralora_fx.core.tracing.inputs.cache import cached_slots
    from gralora_fx.format.cache_slots import keeps_state

    if not keeps_state(cached_slots(inputs)):
        yield
        return
    from gralora_fx.features.states.cached_states import fresh_states

    with fresh_states():
        yield


def forgets_before_prompts(model: nn.Module) -> bool:
    """Return whether transformers' code of a model reads several tokens as if none came before (selective scans)."""
    return any(code.replaces_in(part) for part in model.modules() for code in _SELECTIVE_SCANS)
