"""The colour scale and the coarser grids."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from gralora_fx.picture.style import (
    DARK,
    NOT_FINITE,
    PAINTS,
    ZERO,
    coarser,
    dark_style,
    heat_colour,
    short_number,
    text_on,
)


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_larger_is_darker() -> None:
    scale = [luminance(heat_colour(value / 100, 1.0)) for value in range(1, 101)]
    assert all(left >= right for left, right in pairwise(scale))
    assert scale[0] - scale[-1] > 0.6


def test_a_dark_screen_has_a_colour_for_each_and_the_same_contrast() -> None:
    for paint in PAINTS.values():
        assert contrast(DARK[paint.fill], DARK[paint.text]) >= 7
        assert contrast(DARK[paint.border], DARK[paint.fill]) >= 1.5
    on_the_scale = {heat_colour(value / 1000, 1.0) for value in range(1, 1001)}
    assert not on_the_scale & DARK.keys()
    style = dark_style()
    assert "prefers-color-scheme: dark" in style
    assert all(f'[fill="{light}"]{{fill:{dark}}}' in style for light, dark in DARK.items())


def test_zero_and_not_finite_are_off_the_scale() -> None:
    assert heat_colour(0.0, 1.0) == ZERO == heat_colour(0.0, 0.0)
    assert heat_colour(math.nan, 1.0) == heat_colour(math.inf, 1.0) == NOT_FINITE
    assert ZERO not in {heat_colour(value / 100, 1.0) for value in range(1, 101)}


def test_text_can_be_read_on_every_colour() -> None:
    for value in range(1, 101):
        colour = heat_colour(value / 100, 1.0)
        assert contrast(colour, text_on(colour)) >= 4.5
    assert all(contrast(paint.fill, paint.text) >= 7 for paint in PAINTS.values())
    assert all(
        contrast(paint.border, "#ffffff") >= 3 for status, paint in PAINTS.items() if status in ("active", "merged")
    )


def test_coarser_grids_keep_the_norm() -> None:
    norms = [[float(4 * j + n) for n in range(4)] for j in range(4)]
    assert coarser(norms, 2)[0][1] == pytest.approx(math.hypot(2, 3, 6, 7))
    assert coarser(norms, 4) == norms


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0"), (0.123456, "0.12"), (1.0, "1.0"), (123.4, "123"), (0.00123, "1.2e-3"), (12345.0, "1.2e4")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text
