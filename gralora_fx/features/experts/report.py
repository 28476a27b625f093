"""How a mixture's experts were exported, for the report of an export."""

from __future__ import annotations

from gralora_fx.exporters.reports import LayersReport


class ExpertsReport(LayersReport):
    """Which layers' experts are one operator, and why the others are not: a loop, or products of their own."""

    FIELD = "experts"
    FUSED, PLAIN = "layers with one operator each", "without"
