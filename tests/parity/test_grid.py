"""The grid is as large as it is said to be."""

from __future__ import annotations

from collections import Counter

from architectures import ARCHITECTURES
from cases import GRID, GROUPS


def test_the_grid_has_more_than_400_cases_at_20_architectures() -> None:
    assert len(ARCHITECTURES) == 20
    assert len(GRID) >= 420
    assert len({str(case) for case in GRID}) == len(GRID)
    assert min(Counter(case.architecture for case in GRID).values()) >= 21


def test_every_architecture_is_in_one_group() -> None:
    assert Counter(name for names in GROUPS.values() for name in names) == Counter(list(ARCHITECTURES))
