"""Rewrite traced models with GraLoRA adapters; train, merge, export to ONNX and serve them."""

from gralora_fx.config import GraloraConfig
from gralora_fx.merging import merge
from gralora_fx.model import GraloraModel
from gralora_fx.planning import RewritePlan, plan
from gralora_fx.rewriting import rewrite
from gralora_fx.sites import LinearSite
from gralora_fx.tracing.trace import trace
from gralora_fx.tracing.traced import TracedModel

__all__ = [
    "GraloraConfig",
    "GraloraModel",
    "LinearSite",
    "RewritePlan",
    "TracedModel",
    "merge",
    "plan",
    "rewrite",
    "trace",
]
