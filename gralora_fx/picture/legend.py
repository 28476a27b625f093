"""The head of the picture: its title, what the colours mean, and the scale of the heat maps."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from gralora_fx.picture.boxes import draw_line
from gralora_fx.picture.colours import MEANINGS, PAINTS
from gralora_fx.picture.dot import Source
from gralora_fx.picture.facts import ModelFacts
from gralora_fx.picture.heat import draw_scale
from gralora_fx.picture.labels import Line
from gralora_fx.picture.text import text_width

_INK = "#1b1f24"
_MARGIN = 10.0
_LEAST_WIDTH = 480.0
_STRIP = "a strip: one cell a layer, the root mean square of the norms of its blocks"


def headline(facts: ModelFacts) -> str:
    """One line: how many sites are adapted, and how many values train."""
    adapted = sum(bool(entry.adapters) for entry in facts.sites.values())
    if facts.trainable is None:
        return f"{len(facts.sites)} linear sites; {facts.total:,} parameters"
    share = 100 * facts.trainable / max(facts.total, 1)
    verb = "would train" if any(adapter.state == "planned" for adapter in facts.adapters) else "train"
    return (
        f"{adapted} of {len(facts.sites)} sites adapted; {facts.trainable:,} of {facts.total:,} parameters {verb} "
        f"({share:.2f} %)"
    )


def draw_head(facts: ModelFacts, source: Source, width: float) -> tuple[Element, float, float]:
    """Draw the head above the graph.

    Args:
        facts: The model.
        source: The contents of the picture, which the legend explains.
        width: Width of the graph.

    Returns:
        The group, its width (at least the graph's) and its height.
    """
    title, line = Line(facts.name, 15, "bold"), Line(headline(facts), 11)
    widths = [text_width(row.text, row.size, bold=bool(row.style)) for row in (title, line)]
    width = max(width, _LEAST_WIDTH, *(2 * _MARGIN + needed for needed in widths))
    group = Element("g", {"class": "head"})
    group.append(draw_line(title, _MARGIN, 22, _INK, anchor="start"))
    group.append(draw_line(line, _MARGIN, 40, _INK, anchor="start"))
    x, y = _MARGIN, 52.0
    statuses = {box.status for _, box in source.boxes.values()}
    shown = [status for status in PAINTS if status in statuses] + ["again"] * source.calls_again
    for status in shown:
        meaning = Line(MEANINGS[status], 11)
        needed = 21 + text_width(meaning.text, meaning.size)
        if x > _MARGIN and x + needed > width - _MARGIN:
            x, y = _MARGIN, y + 18
        group.append(_swatch(status, x, y))
        group.append(draw_line(meaning, x + 21, y + 9.5, _INK, anchor="start"))
        x += needed + 10
    y += 24
    if facts.largest_norm is not None:
        group.append(draw_scale(facts.largest_norm, left=_MARGIN, top=y + 12))
        y += 46
    if source.has_strips:
        group.append(draw_line(Line(_STRIP, 10), _MARGIN, y + 4, _INK, anchor="start"))
        y += 16
    return group, width, y


def _swatch(status: str, x: float, y: float) -> Element:
    if status == "again":
        line = {"x1": f"{x:.1f}", "x2": f"{x + 16:.1f}", "y1": f"{y + 5.5:.1f}", "y2": f"{y + 5.5:.1f}"}
        return Element("line", line | {"stroke": "#57606a", "stroke-dasharray": "4 2"})
    paint = PAINTS[status]
    swatch = Element("rect", {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": "16", "height": "11", "rx": "3"})
    swatch.attrib |= {"fill": paint.fill, "stroke": paint.border}
    if paint.dashed:
        swatch.set("stroke-dasharray", "4 2")
    return swatch
