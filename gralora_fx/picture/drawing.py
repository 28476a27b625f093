"""Completion of Graphviz's SVG: boxes, tooltips, heat maps, head, and text for screen readers."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from gralora_fx.picture.boxes import draw_box, draw_line, titled
from gralora_fx.picture.colours import dark_style
from gralora_fx.picture.dot import Source
from gralora_fx.picture.facts import ModelFacts
from gralora_fx.picture.labels import tooltip_of
from gralora_fx.picture.legend import draw_head, headline
from gralora_fx.picture.text import printable, text_width

_SVG = "http://www.w3.org/2000/svg"


def finish(svg: str, facts: ModelFacts, source: Source) -> str:
    """Draw the parts of a laid-out graph that Graphviz does not.

    Args:
        svg: Graphviz's output.
        facts: The model.
        source: The source it was made from.

    Returns:
        The finished SVG, without an XML declaration, so that a page can hold it.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    graph = root.find("g")
    assert graph is not None  # Graphviz writes one group around everything
    graph.attrib.pop("id")
    for group in graph.findall("g"):
        key = group.attrib.pop("id")
        for title in group.findall("title"):
            group.remove(title)  # identifiers of the source
        if key in source.boxes:
            _fill_box(group, facts, source, key)
        elif key in source.frames:
            _title_frame(group, source, key)
    return _assembled(root, graph, facts, source)


def _fill_box(group: Element, facts: ModelFacts, source: Source, key: str) -> None:
    item, box = source.boxes[key]
    left, right, top, bottom = _extent(group)
    group.clear()
    group.attrib |= {"class": f"node {item.kind} {box.status}", "data-path": printable(item.path)}
    if len(box.alike) > 1:
        group.set("data-alike", printable("\n".join(box.alike)))
    titled(group, tooltip_of(item, facts, box.alike))
    group.extend(draw_box(box, (left + right) / 2, (top + bottom) / 2, facts.largest_norm or 0.0))


def _title_frame(group: Element, source: Source, key: str) -> None:
    block, (name, location) = source.frames[key]
    text = group.find("text")
    assert text is not None  # every frame is written with a label
    group.remove(text)
    shape = group[0]
    left = min(x for x, _ in _points(shape)) + 10
    baseline = float(text.get("y", "0"))
    tooltip = Element("title")
    tooltip.text = printable("\n".join(block.alike or (block.path,)))
    group.insert(0, tooltip)
    group.set("data-path", printable(block.path))
    group.append(draw_line(name, left, baseline, "#1b1f24", anchor="start"))
    after = left + text_width(name.text, name.size, bold=True) + 6
    group.append(draw_line(location, after, baseline, "#57606a", anchor="start"))


def _extent(group: Element) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a box."""
    points = _points(group[0])
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), max(xs), min(ys), max(ys)


def _points(shape: Element) -> list[tuple[float, float]]:
    """The points of a polygon, or of a path of straight and curved pieces."""
    text = shape.get("points") or shape.get("d", "").translate({ord("M"): None, ord("C"): " "})
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


def _assembled(root: Element, graph: Element, facts: ModelFacts, source: Source) -> str:
    """Put the head above the graph, with a background and styles for light and dark screens."""
    _, _, graph_width, graph_height = (float(number) for number in root.get("viewBox", "").split())
    head, width, head_height = draw_head(facts, source, graph_width)
    height = head_height + graph_height
    svg = Element(
        "svg",
        {
            "xmlns": _SVG,
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "viewBox": f"0 0 {width:.2f} {height:.2f}",
            "role": "img",
            "aria-labelledby": "picture-title picture-description",
        },
    )
    SubElement(svg, "title", {"id": "picture-title"}).text = printable(f"Graph of {facts.name}")
    SubElement(
        svg, "desc", {"id": "picture-description"}
    ).text = f"{headline(facts)}. Linear sites by block, from the inputs at the top to the output at the bottom."
    SubElement(svg, "style").text = dark_style()
    SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    svg.append(head)
    shift = SubElement(svg, "g", {"transform": f"translate({(width - graph_width) / 2:.2f} {head_height:.2f})"})
    shift.append(graph)
    return ElementTree.tostring(svg, encoding="unicode")
