"""The files that are scheduled by name are there, each in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scheduling import GROUPS, LONG, SAMPLED, sampled


def test_every_file_that_is_named_is_there_and_named_once() -> None:
    files = [file for files in (*GROUPS.values(), LONG) for file in files]
    assert [file for file in files if not (Path(__file__).parent / file).is_file()] == []
    assert len(set(files)) == len(files)


@dataclass(frozen=True)
class Item:
    """A test, as far as sampling looks at it."""

    nodeid: str


def test_every_test_that_is_left_out_or_sampled_is_there() -> None:
    for name in (*SAMPLED["every"], *SAMPLED["elsewhere"], *SAMPLED["slow"]):
        file, _, function = name.partition("::")
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, name


def test_a_sample_has_every_nth_of_a_grid_none_of_what_is_elsewhere_and_all_else() -> None:
    name = "parity/test_parity_decoders.py::test_the_same_as_in_peft"
    grid = [Item(f"tests/{name}[{index}]") for index in range(150)]
    elsewhere = [Item(f"tests/{next(iter(SAMPLED['elsewhere']))}")]
    others = [Item("tests/test_cli.py::test_export_then_verify"), Item("README.md::README.md")]
    slow = [Item("tests/test_demo.py::test_demo"), Item("tests/model/test_sharding.py::test_two[1]")]
    assert sampled([*slow, *grid, *elsewhere, *others], slow=True) == slow  # type: ignore[list-item, comparison-overlap]
    assert sampled([*slow, *grid, *elsewhere, *others]) == [*grid[:: SAMPLED["every"][name]], *others]  # type: ignore[list-item, comparison-overlap]
