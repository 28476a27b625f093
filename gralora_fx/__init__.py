"""Rewrite traced models with GraLoRA, LoRA or DoRA adapters; train, merge, export to ONNX and serve them."""

import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Official builds of ONNX Runtime from 1.29 on tell Microsoft about models and sessions, and keep an id of the machine
# below the home. They look here once, when they are imported; who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from gralora_fx.core.config import GraloraConfig
    from gralora_fx.core.graph.sites import LinearSite
    from gralora_fx.core.methods.dora import DoraConfig
    from gralora_fx.core.methods.lora import LoraConfig
    from gralora_fx.core.model.gralora_model import GraloraModel
    from gralora_fx.core.model.rewrite import merge, rewrite
    from gralora_fx.core.planning.planner import plan
    from gralora_fx.core.planning.rewrite_plan import RewritePlan
    from gralora_fx.core.tracing.trace import trace
    from gralora_fx.core.tracing.traced_model import TracedModel

__all__ = [
    "DoraConfig",
    "GraloraConfig",
    "GraloraModel",
    "LinearSite",
    "LoraConfig",
    "RewritePlan",
    "TracedModel",
    "merge",
    "plan",
    "rewrite",
    "trace",
]

# Where each name lives. They are imported on first use: torch and transformers take seconds, which a command line that
# only shows its help, or refuses its options, should not wait for.
_HOMES = {
    "DoraConfig": "core.methods.dora",
    "GraloraConfig": "core.config.gralora_config",
    "GraloraModel": "core.model.gralora_model",
    "LinearSite": "core.graph.sites",
    "LoraConfig": "core.methods.lora",
    "RewritePlan": "core.planning.rewrite_plan",
    "TracedModel": "core.tracing.traced_model",
    "merge": "core.model.rewrite",
    "plan": "core.planning.planner",
    "rewrite": "core.model.rewrite",
    "trace": "core.tracing.trace",
}


def first_use(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a module's `__getattr__`, which imports each of its names on first use."""

    def imported(name: str) -> Any:
        """Import a name on first use."""
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(import_module(f"gralora_fx.{homes[name]}"), name)
        setattr(sys.modules[module], name, value)
        return value

    return imported


__getattr__ = first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
