"""How a picture looks: a colour for each state of a site, a scale for the heat maps, and the width of text."""

from __future__ import annotations

import math
import unicodedata
from typing import NamedTuple


class Paint(NamedTuple):
    """How a box is drawn: its fill, its border, its text, and whether the border is dashed."""

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
    """Style rules that give a picture its dark colours where the reader's screen is dark.

    White text stays, since it is on the dark colours of the scale.
    """
    rules = [
        f'{":not(text)" if light == ZERO else ""}[fill="{light}"]{{fill:{dark}}}[stroke="{light}"]{{stroke:{dark}}}'
        for light, dark in DARK.items()
    ]
    return f"@media (prefers-color-scheme: dark){{{''.join(rules)}}}"


def heat_colour(value: float, largest: float) -> str:
    """Colour of a norm on the scale from 0 to the largest one; zero and values that are not finite have their own."""
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
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (_linear(channel / 255) for channel in _channels(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # of WCAG 2; the two contrasts are equal at 0.179
    return "#000000" if luminance > 0.179 else "#ffffff"


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a line in points, by the wider of the sans-serif fonts that a reader may have (DejaVu Sans).

    Args:
        text: The line.
        size: Size of the font in points.
        bold: Whether it is bold.
    """
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
    """A name that fits a box: the middle of a longer one is left out."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def printable(text: str) -> str:
    """Text with every character that XML or a line cannot hold replaced; line ends stay."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)
