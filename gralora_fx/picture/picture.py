"""`svg_of`: the picture of a model's graph."""

from __future__ import annotations

from gralora_fx.picture.blocks import BlockMap
from gralora_fx.picture.dot import dot_source
from gralora_fx.picture.drawing import finish
from gralora_fx.picture.facts import AdaptedModel, ModelFacts, read_facts
from gralora_fx.picture.flow import condense
from gralora_fx.picture.folding import Folding
from gralora_fx.picture.layout import lay_out
from gralora_fx.planning.rewrite_plan import RewritePlan
from gralora_fx.tracing.traced_model import TracedModel


def svg_of(model: TracedModel | AdaptedModel, *, plan: RewritePlan | None = None, full: bool = False) -> str:
    """Draw a model's graph: its linear sites by block, what is adapted, and how large each update is.

    Args:
        model: A `GraloraModel`, or a `TracedModel`.
        plan: A plan for a rewrite of the traced model.
        full: Whether to draw all layers, rather than one for each run of three or more equal ones.

    Returns:
        An SVG document, readable by itself.

    Raises:
        RewriteError: The model or the plan cannot be drawn, or (as `PictureError`) Graphviz fails.
    """
    return draw(read_facts(model, plan), full=full)


def draw(facts: ModelFacts, *, full: bool) -> str:
    """Draw the facts of a model."""
    blocks = BlockMap(facts.sites)
    flow = condense(facts, blocks)
    root = blocks.tree(item.path for item in flow.items if item.kind in ("site", "part"))
    folding = Folding(root, facts, flow, full=full)
    source = dot_source(facts, flow, blocks, root, folding)
    return finish(lay_out(source.text), facts, source)
