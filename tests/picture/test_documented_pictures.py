"""The pictures of the documentation are what its script draws: every box with its state, its words and its tooltip.

Coordinates are left out: they are Graphviz's, and another version of it places boxes otherwise.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from reading_svg import boxes, parsed, tooltip, words

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "draw_pictures.py"))


def contents(svg: str) -> dict[str, tuple[str | None, str, str]]:
    found = {path: (group.get("class"), words(group), tooltip(group)) for path, group in boxes(svg).items()}
    return found or {"": (None, words(parsed(svg)), "")}  # a picture of something else than a model


def test_the_pictures_are_those_that_the_script_draws(script: dict[str, Any], tmp_path: Path) -> None:
    script["main"](["--output", str(tmp_path)])
    names = {path.name for path in (DOCS / "images").glob("*.svg")} - {"entanglement.svg"}  # an example's
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        committed = (DOCS / "images" / name).read_text(encoding="utf-8")
        assert contents(committed) == contents((tmp_path / name).read_text(encoding="utf-8")), (
            f"{name} is not what is drawn now; run python docs/draw_pictures.py"
        )


def test_the_first_picture_shows_every_state_of_a_new_adapter() -> None:
    drawn = contents((DOCS / "images" / "classifier.svg").read_text(encoding="utf-8"))
    states = {path: (state or "").split()[-1] for path, (state, _, _) in drawn.items()}
    assert {path: states[path] for path in ("query", "value", "key", "projection", "classifier")} == {
        "query": "active",
        "value": "active",
        "key": "rejected",
        "projection": "rejected",
        "classifier": "saved",
    }
