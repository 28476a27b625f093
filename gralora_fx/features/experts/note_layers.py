"""Experts that are not one operator in a trace, for the report of an export."""

from __future__ import annotations

from torch import fx

from gralora_fx.core.graph.module_tree import innermost_path
from gralora_fx.core.graph.pipeline import PassResult, Skip
from gralora_fx.features.experts.report import ExpertsReport

_WHY = "between its products it computes what no operator does, so that each of its experts is a product of its own"


def note_experts(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Name the layers whose experts are grouped products, each with the reason; the graph stays as it is."""
    products = [node for node in graph.nodes if node.op == "call_function" and "grouped_mm" in str(node.target)]
    layers = dict.fromkeys(innermost_path(node) or node.name for node in products)
    skipped = tuple(Skip(layer, _WHY) for layer in layers)
    return PassResult(0, skipped, summary=ExpertsReport(0, dict(skipped)) if skipped else None)
