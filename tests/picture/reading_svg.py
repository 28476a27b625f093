"""Read a picture back: its boxes by path, their words and tooltips."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> Element:
    return ElementTree.fromstring(svg)


def boxes(svg: str) -> dict[str, Element]:
    """Return the groups of boxes and frames by path."""
    return {path: group for group in parsed(svg).iter(f"{SVG}g") if (path := group.get("data-path")) is not None}


def words(group: Element) -> str:
    return "\n".join(text.text or "" for text in group.iter(f"{SVG}text"))


def tooltip(group: Element) -> str:
    return group.findtext(f"{SVG}title") or ""
