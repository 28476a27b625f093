"""Plain LoRA, rsLoRA and DoRA: everything that a user sees of an adapter is as in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from cases import DORA_GRID, LORA_GRID, Case, as_parameters
from compare import compare
from parity_table import PROPERTY


def test_the_grid_has_more_than_150_cases_at_every_architecture() -> None:
    assert len({str(case) for case in LORA_GRID}) == len(LORA_GRID) >= 150
    assert {case.architecture for case in LORA_GRID} == set(ARCHITECTURES)


def test_the_grid_of_dora_has_every_architecture() -> None:
    assert len({str(case) for case in DORA_GRID}) == len(DORA_GRID) >= 60
    assert {case.architecture for case in DORA_GRID} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", as_parameters([*LORA_GRID, *DORA_GRID], pytest.mark.quick))
def test_the_same_as_in_peft(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    outcomes = compare(case, tmp_path)
    for aspect, problem in outcomes.items():
        record_property(PROPERTY, (case.architecture, aspect, not problem))
    assert not any(outcomes.values()), "\n".join(f"{aspect}: {p}" for aspect, p in outcomes.items() if p)
