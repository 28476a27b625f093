"""A model's graph as SVG: Graphviz's drawing plus a title, boxes, heat maps and text for screen readers."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from gralora_fx.base.sources.atomic_save import save_together
from gralora_fx.base.sources.model_files import usable_file
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.picture.blocks import BlockMap, Folding
from gralora_fx.picture.boxes import Line, draw_box, draw_line, titled, tooltip_of
from gralora_fx.picture.dot import DotSource, PictureError, dot_source, lay_out
from gralora_fx.picture.facts import AdaptedModel, ModelFacts, read_facts
from gralora_fx.picture.flow import condense
from gralora_fx.picture.style import MEANINGS, PAINTS, dark_style, draw_scale, printable, text_width

_SVG = "http://www.w3.org/2000/svg"
_INK = "#1b1f24"
_MARGIN = 10.0
_LEAST_WIDTH = 480.0
_STRIP = "a strip: one cell a layer, the root mean square of the norms of its blocks"


def svg_of(model: TracedModel | AdaptedModel, *, plan: RewritePlan | None = None, full: bool = False) -> str:
    """Draw a model's graph: its linear sites by block, what is adapted, and how large each update is."""
    return draw(read_facts(model, plan), full=full)


def draw(facts: ModelFacts, *, full: bool) -> str:
    """Draw the facts of a model."""
    blocks = BlockMap(facts.sites)
    flow = condense(facts, blocks)
    root = blocks.tree(item.path for item in flow.items if item.kind in ("site", "part"))
    folding = Folding(root, facts, [(tail.path, head.path) for tail, head in flow.edges], full=full)
    source = dot_source(facts, flow, blocks, root, folding)
    return _finish(lay_out(source.text), facts, source)


def save(text: str, path: str | Path) -> Path:
    """Write a picture or page atomically, creating missing folders."""
    target = usable_file(path, PictureError, writes=True)
    save_together(target.parent, {"": {target.name: lambda draft: draft.write_bytes(text.encode())}}, PictureError)
    return target


def headline(facts: ModelFacts) -> str:
    """Return one line: how many sites are adapted, and how many parameters train."""
    adapted = sum(bool(entry.adapters) for entry in facts.sites.values())
    if facts.trainable is None:
        return f"{len(facts.sites)} linear sites; {facts.total:,} parameters"
    share = 100 * facts.trainable / max(facts.total, 1)
    verb = "would train" if any(adapter.state == "planned" for adapter in facts.adapters) else "train"
    return (
        f"{adapted} of {len(facts.sites)} sites adapted; {facts.trainable:,} of {facts.total:,} parameters {verb} "
        f"({share:.2f} %)"
    )


def _finish(svg: str, facts: ModelFacts, source: DotSource) -> str:
    """Draw the parts of a laid-out graph that Graphviz does not draw."""
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


def _fill_box(group: Element, facts: ModelFacts, source: DotSource, key: str) -> None:
    item, box = source.boxes[key]
    left, right, top, bottom = _extent(group)
    group.clear()
    group.attrib |= {"class": f"node {item.kind} {box.status}", "data-path": printable(item.path)}
    if len(box.alike) > 1:
        group.set("data-alike", printable("\n".join(box.alike)))
    titled(group, tooltip_of(item, facts, box.alike))
    group.extend(draw_box(box, (left + right) / 2, (top + bottom) / 2, facts.largest_norm or 0.0))


def _title_frame(group: Element, source: DotSource, key: str) -> None:
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
    group.append(draw_line(name, left, baseline, _INK, anchor="start"))
    after = left + text_width(name.text, name.size, bold=True) + 6
    group.append(draw_line(location, after, baseline, "#57606a", anchor="start"))


def _extent(group: Element) -> tuple[float, float, float, float]:
    points = _points(group[0])
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), max(xs), min(ys), max(ys)


def _points(shape: Element) -> list[tuple[float, float]]:
    text = shape.get("points") or shape.get("d", "").translate({ord("M"): None, ord("C"): " "})
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


def _assembled(root: Element, graph: Element, facts: ModelFacts, source: DotSource) -> str:
    """Assemble the head and the graph, with a background and styles for light and dark screens."""
    _, _, graph_width, graph_height = (float(number) for number in root.get("viewBox", "").split())
    head, width, head_height = _draw_head(facts, source, graph_width)
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


def _draw_head(facts: ModelFacts, source: DotSource, width: float) -> tuple[Element, float, float]:
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
