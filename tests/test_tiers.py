"""`make quick` runs every stage once: each folder of tests has a test with the mark."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WHOLE_ALONE = ("architectures",)  # models by the dozen, which are what `make test` is for

pytestmark = pytest.mark.quick


def test_every_folder_of_tests_has_a_quick_one() -> None:
    folders = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    quick = {path.parent.name for path in TESTS.glob("*/test_*.py") if "mark.quick" in path.read_text(encoding="utf-8")}
    assert folders - quick == set(WHOLE_ALONE)
