"""Code by which a trace recognises layers with a state, one row each; copies in other models are recognised too."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from gralora_fx.core.tracing.known_code import Recognised

SILU = ("silu", "swish")  # its names in configurations


def _has_gate(norm: Any) -> bool:
    return norm.activation in (*SILU, "sigmoid")


_row = partial(Recognised, folder=__package__)
CAUSAL_CONV = _row("qwen3_next.modeling_qwen3_next:causal_conv1d_fn", "traced_layers:convolve")
DELTA_RULE = _row(
    "qwen3_next.modeling_qwen3_next:torch_chunk_gated_delta_rule", "traced_layers:delta_rule", beside=("l2norm",)
)
KIMI_RULE = _row(
    "kimi_linear.modeling_kimi_linear:chunk_kimi_delta_attention", "traced_layers:delta_rule", beside=("l2norm",)
)
LIGHTNING = _row(
    "minimax.modeling_minimax:MiniMaxLightningAttention.forward", "traced_layers:lightning", ending="LightningAttention"
)
RECURRENCES = (CAUSAL_CONV, DELTA_RULE, KIMI_RULE, LIGHTNING)
_MIXERS = ("MambaMixer", "Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "FalconMambaMixer", "HybridMambaLayer")
STATE_SPACES = (
    _row("mamba2.modeling_mamba2:Mamba2Mixer.forward", "traced_layers:mamba2", _MIXERS),
    _row("falcon_h1.modeling_falcon_h1:FalconH1Mixer.forward", "traced_layers:mamba2", _MIXERS),
    _row("mamba.modeling_mamba:MambaMixer.forward", "traced_layers:mamba", _MIXERS),
    _row("falcon_mamba.modeling_falcon_mamba:FalconMambaMixer.forward", "traced_layers:mamba", _MIXERS),
    _row("jamba.modeling_jamba:JambaMambaMixer.forward", "traced_layers:mamba", _MIXERS),
    _row("zamba.modeling_zamba:ZambaMambaMixer.forward", "traced_layers:zamba", _MIXERS),
)
_SELECTIVE_SCANS = STATE_SPACES[2:]
_GATED = "RMSNormGated"
GATED_NORMS = (
    _row("mamba2.modeling_mamba2:MambaRMSNormGated.forward", "traced_layers:norm_of_gated", _GATED),
    _row(
        "qwen3_next.modeling_qwen3_next:Qwen3NextRMSNormGated.forward",
        "traced_layers:gate_of_normed",
        _GATED,
        fits=_has_gate,
    ),
    _row(
        "kimi_linear.modeling_kimi_linear:KimiLinearRMSNormGated.forward",
        "traced_layers:gate_of_normed",
        _GATED,
        fits=_has_gate,
    ),
)
KNOWN_CODE = (*RECURRENCES, *STATE_SPACES, *GATED_NORMS)


def forgets_before_prompts(model: nn.Module) -> bool:
    """Return whether transformers' code treats several tokens as if no state preceded them (selective scans)."""
    return any(code.replaces_in(part) for part in model.modules() for code in _SELECTIVE_SCANS)
