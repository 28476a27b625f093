"""`html_of`: the picture with its numbers on one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

from gralora_fx.picture.blocks import BlockMap
from gralora_fx.picture.colours import MEANINGS
from gralora_fx.picture.facts import AdaptedModel, ModelFacts, SiteFacts, read_facts
from gralora_fx.picture.heat import draw_grid, draw_scale
from gralora_fx.picture.labels import adapter_line
from gralora_fx.picture.legend import headline
from gralora_fx.picture.overview import overviews
from gralora_fx.picture.picture import draw
from gralora_fx.picture.text import printable
from gralora_fx.planning.rewrite_plan import RewritePlan
from gralora_fx.tracing.traced_model import TracedModel

_MOST_CELLS = 20_000  # of all heat maps of a page; beyond, large ones are drawn coarser
_CELL = (44.0, 22.0)  # points, where cells hold text


@dataclass(frozen=True)
class _Row:
    """A row of the table of sites."""

    entry: SiteFacts
    status: str
    says: str
    norm: str


@dataclass(frozen=True)
class _Map:
    """A heat map with its caption."""

    path: str
    adapter: str
    norm: float
    svg: str


def html_of(model: TracedModel | AdaptedModel, *, plan: RewritePlan | None = None, full: bool = False) -> str:
    """Write a page about a model's graph: counts, adapters, the picture, every site, every heat map.

    It is one file, fetches nothing, and follows the reader's choice of light or dark.

    Args:
        model: A `GraloraModel`, or a `TracedModel`.
        plan: A plan for a rewrite of the traced model.
        full: Whether layers that look alike are all drawn in the picture, rather than one for each run.

    Returns:
        An HTML document.

    Raises:
        RewriteError: The model or the plan cannot be drawn, or (as `PictureError`) Graphviz fails.
    """
    import jinja2
    from markupsafe import Markup

    facts = read_facts(model, plan)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    template = environment.from_string(files(__package__).joinpath("page.html.j2").read_text("utf-8"))
    rows = [_row(entry) for entry in facts.sites.values()]
    largest = facts.largest_norm
    return template.render(
        facts=facts,
        headline=headline(facts),
        picture=Markup(draw(facts, full=full)),
        rows=rows,
        statuses=list(dict.fromkeys(row.status for row in rows)),
        meanings=MEANINGS,
        scale=None if largest is None else Markup(_scale(largest)),
        overviews=overviews(facts, BlockMap(facts.sites)),
        maps=[(entry, Markup(entry.svg)) for entry in _maps(facts)],
    )


def _row(entry: SiteFacts) -> _Row:
    norms = [adapter.update_norm for adapter in entry.adapters]
    says = "; ".join(adapter_line(adapter) for adapter in entry.adapters)
    if entry.saved_by:
        says = "; ".join(filter(None, [says, f"trains whole, as a copy of {', '.join(entry.saved_by)}"]))
    tied = [f"tied with {', '.join(entry.site.tied_with)}"] if entry.site.tied_with else []
    return _Row(
        entry=entry,
        status=entry.status,
        says="; ".join(filter(None, [says or entry.reason, *entry.notes, *tied])),
        norm=", ".join(f"{norm:.4g}" for norm in norms if norm is not None),
    )


def _maps(facts: ModelFacts) -> Iterator[_Map]:
    pairs = [(path, adapter) for path, entry in facts.sites.items() for adapter in entry.adapters]
    is_coarse = sum(adapter.k**2 for _, adapter in pairs) > _MOST_CELLS
    for path, adapter in pairs:
        norm = adapter.update_norm
        if adapter.norms is None or norm is None:
            continue
        k = len(adapter.norms)
        width, height = (_CELL[0] * k, _CELL[1] * k) if k <= 4 else (max(180.0, 12.0 * k),) * 2
        label = f"Block norms of {adapter.name} at {path}"
        svg = _svg(width + 2, height + 2, label)
        grid = draw_grid(
            adapter.norms, facts.largest_norm or 0.0, left=1, top=1, width=width, height=height, coarse=is_coarse
        )
        svg.append(grid)
        yield _Map(path, adapter_line(adapter), norm, ElementTree.tostring(svg, encoding="unicode"))


def _scale(largest: float) -> str:
    svg = _svg(330, 42, "Colour scale of the block norms")
    svg.append(draw_scale(largest, left=6, top=16))
    return ElementTree.tostring(svg, encoding="unicode")


def _svg(width: float, height: float, label: str) -> ElementTree.Element:
    size: dict[str, Any] = {"width": f"{width:g}", "height": f"{height:g}", "viewBox": f"0 0 {width:g} {height:g}"}
    return ElementTree.Element("svg", size | {"role": "img", "aria-label": printable(label)})
