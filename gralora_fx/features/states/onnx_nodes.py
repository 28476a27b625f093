"""The operators of layers with a state in a translated model, until they are lowered."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.exporters.translation.operators import DomainNode
from gralora_fx.features.states.linear_attention import LinearAttention
from gralora_fx.features.states.operators import CausalConv, GatedRmsNorm, PromptClamp


class LinearAttentionNode(DomainNode, LinearAttention[ir.Value]):
    """`LinearAttention`: as `gralora::linear_attention`, with two outputs."""

    op_type = "LinearAttention"


class CausalConvNode(DomainNode, CausalConv[ir.Value]):
    """`CausalConv`: as `gralora::causal_conv`, with two outputs; `silu` is 0 or 1."""

    op_type = "CausalConv"


class GatedRmsNormNode(DomainNode, GatedRmsNorm[ir.Value]):
    """`GatedRMSNorm`: as `gralora::gated_rms_norm`; `silu` is 0 or 1."""

    op_type = "GatedRMSNorm"


class PromptClampNode(DomainNode, PromptClamp[ir.Value]):
    """`PromptClamp`: as `gralora::prompt_clamp`."""

    op_type = "PromptClamp"


NODES = (LinearAttentionNode, CausalConvNode, GatedRmsNormNode, PromptClampNode)
