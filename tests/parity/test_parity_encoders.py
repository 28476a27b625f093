"""Encoders: everything that a user sees of an adapter is as in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Case, cases_of
from compare import compare
from parity_table import PROPERTY


@pytest.mark.parametrize("case", cases_of("encoders"))
def test_the_same_as_in_peft(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    outcomes = compare(case, tmp_path)
    for aspect, problem in outcomes.items():
        record_property(PROPERTY, (case.architecture, aspect, not problem))
    assert not any(outcomes.values()), "\n".join(f"{aspect}: {p}" for aspect, p in outcomes.items() if p)
