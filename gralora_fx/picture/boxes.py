"""Boxes of the picture: their text, their size for Graphviz's layout, and their drawing.

Graphviz sees sizes only, since its WebAssembly build does not support tables in labels; so no name from a model
ever gets into its source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement

from gralora_fx.picture.facts import ModelFacts, SiteAdapter, SiteFacts
from gralora_fx.picture.flow import Item
from gralora_fx.picture.style import (
    FONT,
    PAINTS,
    Rect,
    clipped,
    draw_grid,
    draw_strip,
    grid_size,
    printable,
    strip_size,
    text_width,
)

_LONGEST_REASON = 42
_PADDING = 8.0
_GAP = 4.0  # above and below a heat map

Norms = tuple[tuple[float, ...], ...]


class Line(NamedTuple):
    """A line of a box."""

    text: str
    size: float = 10
    style: str = ""  # "bold", "italic" or ""


class Strip(NamedTuple):
    """The updates of one adapter in layers drawn as one: a cell for each layer's site and norm."""

    cells: tuple[tuple[str, SiteAdapter], ...]


Row = Line | Norms | Strip  # norms are drawn as a heat map


class Box(NamedTuple):
    """A box with its rows, top to bottom."""

    status: str
    rows: Sequence[Row]
    alike: tuple[str, ...] = ()  # paths of the sites it represents, if there are several

    @property
    def width(self) -> float:
        """Width in points."""
        return 2 * _PADDING + max(_size_of(row)[0] for row in self.rows)

    @property
    def height(self) -> float:
        """Height in points."""
        return _PADDING + sum(_size_of(row)[1] for row in self.rows)


def rows_of(item: Item, facts: ModelFacts, within: str, alike: Sequence[str] = ()) -> tuple[str, list[Row]]:
    """Return the status of an item's box, which determines its colours, and its rows."""
    name = clipped(item.path.removeprefix(f"{within}.") if within else item.path)
    if item.kind == "site":
        entry = facts.sites[item.path]
        return entry.status, [Line(name, 12, "bold"), *_site_rows(entry, [facts.sites[path] for path in alike])]
    if item.kind == "part":
        if trained_by := facts.trained_whole.get(item.path):
            return "saved", [Line(name, 11), Line(f"trains whole: {clipped(', '.join(trained_by), 24)}")]
        return "part", [Line(name, 11)]
    return "end", [Line(name, 11)]


def tooltip_of(item: Item, facts: ModelFacts, alike: Sequence[str] = ()) -> str:
    """Return an item's tooltip: everything about it, and the sites that it represents."""
    if item.kind == "site":
        others = [f"also represents {path}" for path in alike if path != item.path]
        return "\n".join([_site_tooltip(facts.sites[item.path]), *others])
    if trained_by := facts.trained_whole.get(item.path, ()):
        return f"{item.path}\ntrains whole, as a copy of {', '.join(trained_by)}"
    return item.path if item.kind in ("part", "output") else f"{item.kind} {item.path}"


def adapter_line(adapter: SiteAdapter) -> str:
    """Describe an adapter: its name, its state unless simply active, its sizes and its scale."""
    state = f" ({adapter.state})" if adapter.state not in ("active", adapter.name) else ""
    return f"{clipped(adapter.name, 24)}{state}: {adapter.sizes} scale={adapter.scale:.4g}"


def short_reason(reason: str) -> str:
    """Return a reason's first clause, shortened to fit a box."""
    clause = re.split(r"[,;]", reason, maxsplit=1)[0]
    return clause if len(clause) <= _LONGEST_REASON else f"{clause[: _LONGEST_REASON - 1]}…"


def _site_rows(entry: SiteFacts, alike: Sequence[SiteFacts]) -> list[Row]:
    rows: list[Row] = [Line(_shape(entry))]
    for index, adapter in enumerate(entry.adapters):
        rows.append(Line(adapter_line(adapter)))
        if adapter.norms is not None and len(alike) > 1:
            rows.append(Strip(tuple((other.site.path, other.adapters[index]) for other in alike)))
        elif adapter.norms is not None:
            rows.append(adapter.norms)
    if entry.saved_by:
        rows.append(Line(f"trains whole: {clipped(', '.join(entry.saved_by), 24)}"))
    elif not entry.adapters and entry.reasons:
        rows.append(Line(short_reason(entry.reason), style="italic"))
    return [*rows, *(Line(clipped(note)) for note in (*entry.notes, *_tied(entry)))]


def _site_tooltip(entry: SiteFacts) -> str:
    site = entry.site
    lines = [site.path, f"{site.kind}, {_shape(entry)}"]
    lines += [f"adapter {adapter_line(adapter)}{_norm(adapter)}" for adapter in entry.adapters]
    if entry.saved_by:
        lines.append(f"trains whole, as a copy of {', '.join(entry.saved_by)}")
    elif not entry.adapters and entry.reasons:
        lines.append(f"rejected: {entry.reason}")
    lines += [f"its weight is also {name}" for name in site.tied_with]
    return "\n".join([*lines, *entry.notes])


def _shape(entry: SiteFacts) -> str:
    site = entry.site
    kind = "" if site.kind == "linear" else f", {site.kind}"
    calls = "" if entry.calls == 1 else f", {entry.calls} calls" if entry.calls else ", not called"
    return f"{site.in_features} → {site.out_features}{kind}{calls}"


def _tied(entry: SiteFacts) -> list[str]:
    names = entry.site.tied_with
    if not names:
        return []
    return [f"tied: {names[0].removesuffix('.weight')}" + (f" + {len(names) - 1}" if len(names) > 1 else "")]


def _norm(adapter: SiteAdapter) -> str:
    norm = adapter.update_norm
    return "" if norm is None else ", zero update" if norm == 0 else f", update norm {norm:.4g}"


def draw_box(box: Box, middle: float, centre: float, largest_norm: float) -> list[Element]:
    """Draw the box, its lines and its heat maps."""
    paint, top = PAINTS[box.status], centre - box.height / 2
    geometry = {"x": middle - box.width / 2, "y": top, "width": box.width, "height": box.height}
    frame = Element("rect", {name: f"{value:.2f}" for name, value in geometry.items()})
    frame.attrib |= {"rx": "10" if box.status == "end" else "4", "fill": paint.fill, "stroke": paint.border}
    if paint.dashed:
        frame.set("stroke-dasharray", "4 2")
    elements, y = [frame], top + _PADDING / 2
    for row in box.rows:
        width, height = _size_of(row)
        if isinstance(row, Line):
            elements.append(draw_line(row, middle, y + 0.78 * height, paint.text))
        else:
            rect = Rect(middle - width / 2, y + _GAP, width, height - 2 * _GAP)
            elements.append(
                draw_strip(_cells_of(row), largest_norm, rect)
                if isinstance(row, Strip)
                else draw_grid(row, largest_norm, rect)
            )
        y += height
    return elements


def draw_line(line: Line, x: float, baseline: float, colour: str, *, anchor: str = "middle") -> Element:
    """Draw a line of text."""
    text = Element("text", {"x": f"{x:.2f}", "y": f"{baseline:.2f}", "text-anchor": anchor, "fill": colour})
    text.attrib |= {"font-family": FONT, "font-size": f"{line.size:g}"}
    if line.style:
        text.set("font-weight" if line.style == "bold" else "font-style", line.style)
    text.text = printable(line.text)
    return text


def titled(group: Element, title: str) -> None:
    """Add a group's tooltip, which must be its first child."""
    SubElement(group, "title").text = printable(title)


def _size_of(row: Row) -> tuple[float, float]:
    if isinstance(row, Line):
        return text_width(row.text, row.size, bold=row.style == "bold"), row.size * 1.35
    width, height = strip_size(len(row.cells)) if isinstance(row, Strip) else grid_size(len(row))
    return width, height + 2 * _GAP


def _cells_of(strip: Strip) -> list[tuple[str, float]]:
    return [
        (
            f"{path}: blocks {adapter.mean_block_norm:.4g}, whole update {adapter.update_norm:.4g}",
            adapter.mean_block_norm or 0.0,
        )
        for path, adapter in strip.cells
    ]
