"""`html_of`: the picture and its numbers as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.picture.blocks import BlockMap
from gralora_fx.picture.boxes import adapter_line
from gralora_fx.picture.facts import AdaptedModel, ModelFacts, SiteFacts, read_facts
from gralora_fx.picture.style import (
    MEANINGS,
    Rect,
    draw_grid,
    draw_scale,
    heat_colour,
    printable,
    short_number,
    text_on,
)
from gralora_fx.picture.svg import draw, headline

MOST_CELLS = 20_000  # of all heat maps of a page; beyond, large ones are drawn coarser
_CELL = (44.0, 22.0)  # points, where cells hold text
_FEWEST_LAYERS = 3  # of an overview; with fewer, the heat maps themselves are one


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


@dataclass(frozen=True)
class _Cell:
    """A norm with its cell's colours."""

    text: str
    fill: str
    ink: str


@dataclass(frozen=True)
class _Overview:
    """A table of one adapter's block norms in the layers of one container: the root mean square at each site."""

    title: str  # the adapter and the container
    columns: tuple[str, ...]  # paths of the sites within a layer
    # paths of the layers, with a cell for each column; None where the layer has no such adapter
    rows: tuple[tuple[str, tuple[_Cell | None, ...]], ...]


def html_of(model: TracedModel | AdaptedModel, *, plan: RewritePlan | None = None, full: bool = False) -> str:
    """Return an HTML page about a model's graph: counts, adapters, the picture, every site, every heat map.

    It is one file, loads nothing from elsewhere, and follows the reader's light or dark setting.
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
        overviews=_overviews(facts, BlockMap(facts.sites)),
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
    is_coarse = sum(adapter.k**2 for _, adapter in pairs) > MOST_CELLS
    for path, adapter in pairs:
        norm = adapter.update_norm
        if adapter.norms is None or norm is None:
            continue
        k = len(adapter.norms)
        width, height = (_CELL[0] * k, _CELL[1] * k) if k <= 4 else (max(180.0, 12.0 * k),) * 2
        label = f"Block norms of {adapter.name} at {path}"
        svg = _svg(width + 2, height + 2, label)
        rect = Rect(1, 1, width, height)
        svg.append(draw_grid(adapter.norms, facts.largest_norm or 0.0, rect, coarse=is_coarse))
        yield _Map(path, adapter_line(adapter), norm, ElementTree.tostring(svg, encoding="unicode"))


def _scale(largest: float) -> str:
    svg = _svg(330, 42, "Colour scale of the block norms")
    svg.append(draw_scale(largest, left=6, top=16))
    return ElementTree.tostring(svg, encoding="unicode")


def _svg(width: float, height: float, label: str) -> ElementTree.Element:
    size: dict[str, Any] = {"width": f"{width:g}", "height": f"{height:g}", "viewBox": f"0 0 {width:g} {height:g}"}
    return ElementTree.Element("svg", size | {"role": "img", "aria-label": printable(label)})


def _overviews(facts: ModelFacts, blocks: BlockMap) -> list[_Overview]:
    """Return a table for each adapter and each container of three or more adapted layers."""
    norms: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for path, entry in facts.sites.items():
        layer = blocks.layer_of(path)
        for adapter in entry.adapters:
            norm = adapter.mean_block_norm
            if layer is not None and norm is not None:
                table = norms.setdefault((adapter.name, layer.rpartition(".")[0]), {})
                table.setdefault(layer, {})[path.removeprefix(f"{layer}.")] = norm
    tables = []
    for (adapter_name, container), table in norms.items():
        if len(table) >= _FEWEST_LAYERS:
            columns = tuple(dict.fromkeys(column for row in table.values() for column in row))
            largest = facts.largest_norm or 0.0  # the end of the one scale of a page
            rows = tuple(
                (layer, tuple(_cell(row.get(column), largest) for column in columns)) for layer, row in table.items()
            )
            tables.append(_Overview(f"{adapter_name}: {container or 'layers'}", columns, rows))
    return tables


def _cell(norm: float | None, largest: float) -> _Cell | None:
    if norm is None:
        return None
    fill = heat_colour(norm, largest)
    return _Cell("0" if norm == 0 else short_number(norm), fill, text_on(fill))
