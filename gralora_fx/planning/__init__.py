"""Matching of a configuration with the sites of a model: `plan` and `RewritePlan`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gralora_fx.planning.planner import plan
    from gralora_fx.planning.rewrite_plan import PlannedSite, RejectedSite, RewritePlan

__all__ = ["PlannedSite", "RejectedSite", "RewritePlan", "plan"]

# imported on first use: PEFT's rules for names (`targets`) are of use without torch
_HOMES = {
    "PlannedSite": "rewrite_plan",
    "RejectedSite": "rewrite_plan",
    "RewritePlan": "rewrite_plan",
    "plan": "planner",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gralora_fx.planning' has no attribute {name!r}")
    return getattr(import_module(f"gralora_fx.planning.{_HOMES[name]}"), name)
