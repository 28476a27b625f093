"""Layers that keep a state in place of keys and values: linear attention, state spaces and causal convolutions."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "states",
    signs=frozenset(
        {
            "gralora::linear_attention",
            "gralora::causal_conv",
            "gralora::gated_rms_norm",
            "gralora::prompt_clamp",
            "com.microsoft::CausalConvWithState",
            "com.microsoft::LinearAttention",
        }
    ),
    parts={
        "known code": "recognised:KNOWN_CODE",
        "step patches": "recognised:with_fresh_states",
        "single tokens": "recognised:forgets_before_prompts",
        "operators": "operators",
        "onnx operators": "onnx_nodes:NODES",
        "mixing passes": "lowering:lower_state_operators",
        "cache passes": "layout:keep_state_layout",
        "form passes": "fast_forms:FORM_PASSES",
        "rows": "rows:StateRows",
    },
)
