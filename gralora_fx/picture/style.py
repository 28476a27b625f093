"""Styles: a colour for each state, text widths, and heat maps of block norms with their scale."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement


class Paint(NamedTuple):
    """Colours of a box: fill, border and text, and whether the border is dashed."""

    fill: str
    border: str
    text: str = "#1b1f24"
    dashed: bool = False


# Fills are light, so that text keeps a contrast above 7; hues are those of Okabe and Ito, which colour-blind readers
# can distinguish, and every state is written in the box as well.
PAINTS: dict[str, Paint] = {
    "active": Paint("#d7e9f7", "#0072b2"),
    "merged": Paint("#d5f0e6", "#00785a"),
    "waiting": Paint("#ffffff", "#0072b2", dashed=True),
    "planned": Paint("#e9f2fa", "#0072b2", dashed=True),
    "saved": Paint("#fdebc8", "#b36b00"),
    "rejected": Paint("#ececec", "#9a9a9a", text="#4a4a4a"),
    "base": Paint("#ffffff", "#8c959f"),
    "part": Paint("#fafafa", "#c4c9cf", text="#4a4a4a"),
    "end": Paint("#ffffff", "#57606a"),
}

MEANINGS: dict[str, str] = {
    "active": "adapter active",
    "merged": "adapter merged into the weight",
    "waiting": "adapter waiting",
    "planned": "adapter planned",
    "saved": "trains whole, as a copy",
    "rejected": "rejected, with the reason",
    "base": "linear site",
    "part": "other part of the model",
    "end": "input or output",
    "again": "back to a layer that is called again",
}

# The dark-mode colour for each colour outside the heat maps; contrasts are those of the light ones.
DARK: dict[str, str] = {
    "#ffffff": "#0d1117",
    "#fafafa": "#161b22",
    "#f6f8fa": "#161b22",
    "#ececec": "#2d333b",
    "#c4c9cf": "#444c56",
    "#b6bdc5": "#444c56",
    "#9a9a9a": "#768390",
    "#8c959f": "#768390",
    "#57606a": "#9aa4af",
    "#4a4a4a": "#cdd3da",
    "#1b1f24": "#e6edf3",
    "#d7e9f7": "#0b3454",
    "#e9f2fa": "#10283d",
    "#0072b2": "#4aa3df",
    "#d5f0e6": "#0c3b2e",
    "#00785a": "#3fb993",
    "#fdebc8": "#4d3305",
    "#b36b00": "#e0a030",
}

ZERO = "#ffffff"
NOT_FINITE = "#d1007a"

# Nine samples of matplotlib's viridis (van der Walt and Smith, CC0), from light to dark: more ink is a larger update.
_VIRIDIS = ("#fde725", "#addc30", "#5ec962", "#28ae80", "#21918c", "#2c728e", "#3b528b", "#472d7b", "#440154")

FONT = "Helvetica,Arial,sans-serif"
_LONGEST_NAME = 44
_NARROW, _WIDE = frozenset("iljtfrI.,:;'|!()[] "), frozenset("mwMW@%—→")


def dark_style() -> str:
    """Return CSS rules for dark screens; white text stays white, since it is on dark colours of the scale."""
    rules = [
        f'{":not(text)" if light == ZERO else ""}[fill="{light}"]{{fill:{dark}}}[stroke="{light}"]{{stroke:{dark}}}'
        for light, dark in DARK.items()
    ]
    return f"@media (prefers-color-scheme: dark){{{''.join(rules)}}}"


def heat_colour(value: float, largest: float) -> str:
    """Return the colour of a norm on the scale from 0 to `largest`; zero and non-finite values have their own."""
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return ZERO
    position = min(value / largest, 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(position), len(_VIRIDIS) - 2)
    low, high = _channels(_VIRIDIS[index]), _channels(_VIRIDIS[index + 1])
    share = position - index
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(low, high, strict=True))


def text_on(colour: str) -> str:
    """Return black or white, whichever is more legible on a colour."""
    red, green, blue = (_linear(channel / 255) for channel in _channels(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # of WCAG 2; the two contrasts are equal at 0.179
    return "#000000" if luminance > 0.179 else "#ffffff"


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return a line's width in points in DejaVu Sans, the widest common sans-serif font."""
    ems = 0.0
    for character in text:
        if character in _NARROW:
            ems += 0.38
        elif character in _WIDE or unicodedata.east_asian_width(character) in "WF":
            ems += 1.0
        else:
            ems += 0.7 if character.isupper() else 0.62
    return ems * size * (1.08 if bold else 1.0)


def clipped(name: str, longest: int = _LONGEST_NAME) -> str:
    """Shorten a name to fit a box, leaving out its middle."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def printable(text: str) -> str:
    """Replace every character that XML or a line cannot hold; keep line ends."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


Grid = Sequence[Sequence[float]]

_LINE = "#8c959f"
_LARGEST_TEXT_GRID = 4  # blocks a side up to which the cells of a grid hold their values
_LARGEST_GRID = 16  # blocks a side of the grids in boxes; larger ones are drawn coarser


class Rect(NamedTuple):
    """A rectangle of the picture, in points."""

    left: float
    top: float
    width: float
    height: float

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes of a thinly outlined SVG `rect`."""
        numbers = zip(("x", "y", "width", "height"), self, strict=True)
        return {**{name: f"{number:.2f}" for name, number in numbers}, "stroke-width": "0.4"}


def draw_grid(norms: Grid, largest: float, rect: Rect, *, coarse: bool = True) -> Element:
    """Draw a grid of cells, each with its value as tooltip or text; a zero block is white with a dot."""
    k = len(norms)
    shown = coarser(norms, _grid_blocks(k)) if coarse else norms
    side, step = len(shown), k // len(shown)
    is_zero = all(value == 0 for row in shown for value in row)
    group = Element("g", {"class": "heat zero" if is_zero else "heat"})
    cell_width, cell_height = rect.width / side, rect.height / side
    for j, row in enumerate(shown):
        for n, value in enumerate(row):
            x, y, colour = rect.left + n * cell_width, rect.top + j * cell_height, heat_colour(value, largest)
            cell = SubElement(group, "g")
            SubElement(cell, "title").text = f"output {_span(j, step)}, input {_span(n, step)}: {value:.4g}"
            SubElement(cell, "rect", Rect(x, y, cell_width, cell_height).attributes | {"fill": colour, "stroke": _LINE})
            if value == 0:
                _dot(cell, x + cell_width / 2, y + cell_height / 2, min(cell_height / 6, 1.5))
            elif k <= _LARGEST_TEXT_GRID:
                size = min(cell_height * 0.55, cell_width * 0.27)
                middle = (x + cell_width / 2, y + cell_height / 2 + size * 0.35)
                _text(cell, short_number(value), *middle, size, text_on(colour))
    return group


def draw_strip(cells: Sequence[tuple[str, float]], largest: float, rect: Rect) -> Element:
    """Draw a row of cells on the grids' scale, each with a text as tooltip."""
    group = Element("g", {"class": "heat strip zero" if all(value == 0 for _, value in cells) else "heat strip"})
    cell_width = rect.width / len(cells)
    for index, (title, value) in enumerate(cells):
        x, cell = rect.left + index * cell_width, SubElement(group, "g")
        SubElement(cell, "title").text = printable(title)
        colour = {"fill": heat_colour(value, largest), "stroke": _LINE}
        SubElement(cell, "rect", Rect(x, rect.top, cell_width, rect.height).attributes | colour)
        if value == 0:
            _dot(cell, x + cell_width / 2, rect.top + rect.height / 2, min(cell_width / 4, 1.5))
    return group


def draw_scale(largest: float, *, left: float, top: float) -> Element:
    """Draw the scale of all grids and strips, and the symbol of a zero block."""
    group = Element("g", {"class": "scale"})
    if largest == 0:
        _text(group, "every update is still zero", left + 28, top + 10, 10, anchor="start")
    height, step, steps = 12, 5, 40
    _text(group, "norm of a block of the update (rows: outputs, columns: inputs)", left, top - 5, 10, anchor="start")
    for index in range(steps if largest else 0):
        colour = heat_colour((index + 0.5) / steps, 1.0)
        cell = Rect(left + 40 + index * step, top, step + 0.3, height)
        SubElement(group, "rect", cell.attributes | {"fill": colour})
    zero = Rect(left, top, 18, height).attributes | {"fill": ZERO, "stroke": _LINE}
    SubElement(group, "rect", zero)
    _dot(group, left + 9, top + height / 2, 1.5)
    _text(group, "zero", left + 9, top + height + 11, 9)
    for share in (0.0, 0.5, 1.0) if largest else ():
        label = "> 0" if share == 0 else short_number(share * largest)
        _text(group, label, left + 40 + share * steps * step, top + height + 11, 9)
    return group


def grid_size(k: int) -> tuple[float, float]:
    """Return width and height in points of the heat map of `k x k` blocks in a box."""
    if k <= _LARGEST_TEXT_GRID:
        return 34.0 * k, 17.0 * k
    side = _grid_blocks(k)
    cell = max(6.0, 112 // side)
    return cell * side, cell * side


def strip_size(cells: int) -> tuple[float, float]:
    """Return width and height in points of a strip in a box."""
    return cells * min(14.0, max(3.0, 180.0 / cells)), 14.0


def coarser(norms: Grid, side: int) -> list[list[float]]:
    """Merge norms into fewer, larger blocks, exactly: the root of the sum of squares."""
    step = len(norms) // side
    return [
        [
            math.hypot(*(value for row in norms[j * step : (j + 1) * step] for value in row[n * step : (n + 1) * step]))
            for n in range(side)
        ]
        for j in range(side)
    ]


def short_number(value: float) -> str:
    """Format a norm in at most six characters."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 0.01 <= value < 1000:
        return f"{value:#.2g}" if value < 10 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _grid_blocks(k: int) -> int:
    """Return the blocks per side drawn in a box: `k`, or fewer that each represent several."""
    return next(side for side in range(min(k, _LARGEST_GRID), 0, -1) if k % side == 0)


def _span(index: int, step: int) -> str:
    return f"block {index}" if step == 1 else f"blocks {index * step} to {(index + 1) * step - 1}"


def _dot(parent: Element, x: float, y: float, radius: float) -> None:
    """Draw the symbol of zero in the middle of a cell."""
    SubElement(parent, "circle", {"cx": f"{x:.2f}", "cy": f"{y:.2f}", "r": f"{radius:.2f}", "fill": _LINE})


def _text(
    parent: Element, content: str, x: float, y: float, size: float, fill: str = "#1b1f24", anchor: str = "middle"
) -> None:
    attributes = {"x": f"{x:.2f}", "y": f"{y:.2f}", "text-anchor": anchor, "font-size": f"{size:.2f}", "fill": fill}
    SubElement(parent, "text", attributes | {"font-family": FONT}).text = content
