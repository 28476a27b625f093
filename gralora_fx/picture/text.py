"""Text in a picture: its width, how it is shortened, and replacement of characters invalid in XML."""

from __future__ import annotations

import unicodedata

FONT = "Helvetica,Arial,sans-serif"
_LONGEST_NAME = 44
_NARROW, _WIDE = frozenset("iljtfrI.,:;'|!()[] "), frozenset("mwMW@%—→")


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
