"""Mixtures of experts: one operator a layer, of which each token passes those that a router chose for it."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "experts",
    signs=frozenset({"gralora::experts", "transformers::grouped_mm_fallback", "aten::_grouped_mm", "gralora_gate"}),
    parts={
        "config sizes": "names:SIZES",
        "stacks": "names:STACKS",
        "trace patches": "recognised:as_operators",
        "operators": "operators",
        "onnx operators": "onnx_nodes:NODES",
        "noting passes": "note_layers:note_experts",
        "lowering passes": "lowering:LOWER_EXPERTS",
        "storing passes": "functions:write_expert_functions",
        "weight formats": "formats:with_formats_of_experts",
        "quantized weights": "blocks:quantize_experts",
        "rounded weights": "references:rounded_experts",
        "float weights": "references:experts_in_floats",
        "arrangements": "rows:arrangement_at",
    },
)
