"""A configuration held against the sites of a model: `plan` and the `RewritePlan` it makes."""

from gralora_fx.planning.planner import plan
from gralora_fx.planning.rewrite_plan import PlannedSite, RejectedSite, RewritePlan

__all__ = ["PlannedSite", "RejectedSite", "RewritePlan", "plan"]
