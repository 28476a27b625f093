"""The files that are scheduled by name are there, each in one place."""

from __future__ import annotations

from pathlib import Path

from scheduling import GROUPS, LONG


def test_every_file_that_is_named_is_there_and_named_once() -> None:
    files = [file for files in (*GROUPS.values(), LONG) for file in files]
    assert [file for file in files if not (Path(__file__).parent / file).is_file()] == []
    assert len(set(files)) == len(files)
