"""Matching of a configuration with the sites of a model: `plan` and `RewritePlan`."""

from gralora_fx.planning.planner import plan
from gralora_fx.planning.rewrite_plan import PlannedSite, RejectedSite, RewritePlan

__all__ = ["PlannedSite", "RejectedSite", "RewritePlan", "plan"]
