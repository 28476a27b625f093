"""Boxes of the picture: measured for Graphviz, which places them, then drawn at those places.

Graphviz sees sizes only, since its WebAssembly build does not support tables in labels; so no name from a model ever
gets into its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement

from gralora_fx.picture.colours import PAINTS
from gralora_fx.picture.heat import draw_grid, draw_strip, grid_size, strip_size
from gralora_fx.picture.labels import Line, Row, Strip
from gralora_fx.picture.text import FONT, printable, text_width

_PADDING = 8.0
_GAP = 4.0  # above and below a heat map


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


def draw_box(box: Box, middle: float, centre: float, largest_norm: float) -> list[Element]:
    """The box, its lines and its heat maps.

    Args:
        box: The box.
        middle: Where it is, from left to right.
        centre: Where it is, from top to bottom.
        largest_norm: End of the scale of the heat maps.
    """
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
            left, inner = middle - width / 2, height - 2 * _GAP
            if isinstance(row, Strip):
                cells = _cells_of(row)
                elements.append(draw_strip(cells, largest_norm, left=left, top=y + _GAP, width=width, height=inner))
            else:
                elements.append(draw_grid(row, largest_norm, left=left, top=y + _GAP, width=width, height=inner))
        y += height
    return elements


def draw_line(line: Line, x: float, baseline: float, colour: str, *, anchor: str = "middle") -> Element:
    """A line of text."""
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
