"""Files written anew with changes: their bytes, their digests, and what a failure leaves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gralora_fx.base.sources import rewriting
from gralora_fx.base.sources.rewriting import NewFile, Part, StoredBytes, copies, write_files
from gralora_fx.errors import CheckpointError

pytestmark = pytest.mark.quick


class Inversion:
    """An edit that inverts every byte, and knows how often it was prepared and for which rows it was called."""

    takes_rows = True

    def __init__(self) -> None:
        self.prepared, self.firsts = 0, list[int]()

    def prepare(self) -> Callable[[NDArray[Any], int], None]:
        self.prepared += 1

        def invert(rows: NDArray[Any], first: int) -> None:
            self.firsts.append(first)
            np.invert(rows, out=rows)

        return invert


def inverted(source: Path, begin: int, end: int, columns: int, place: int | None = None) -> Part:
    stored = StoredBytes(source, begin, end)
    return Part(begin if place is None else place, end - begin, stored, Inversion(), columns=columns)


def copied(source: Path, begin: int, end: int, place: int | None = None) -> Part:
    return Part(begin if place is None else place, end - begin, StoredBytes(source, begin, end))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("by_system", [True, False])
def test_a_file_has_the_bytes_of_its_parts_and_their_digest(
    workers: int, by_system: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied ranges, tensors changed in place and behind the others, and zeros between."""
    monkeypatch.setattr(rewriting, "COPIED", 2**21)
    if not by_system:
        monkeypatch.delattr("os.copy_file_range", raising=False)
    content, source = os.urandom(20_000_000), tmp_path / "one"
    source.write_bytes(content)
    parts = [
        copied(source, 0, 100),
        inverted(source, 100, 9_000_100, 1000),
        inverted(source, 9_000_100, 9_000_150, 50),
        copied(source, 9_000_150, 20_000_000),
        inverted(source, 7, 77, 7, place=20_004_864),
    ]
    (tmp_path / "new").mkdir()
    files = [NewFile("other", parts), NewFile("empty", [], b"head")]
    digests = write_files(files, tmp_path / "new", workers=workers, digests=True)
    written = (tmp_path / "new" / "other").read_bytes()
    flipped = bytes(255 - byte for byte in content[100:9_000_150])
    assert written[:20_000_000] == content[:100] + flipped + content[9_000_150:]
    assert written[20_000_000:] == bytes(4864) + bytes(255 - byte for byte in content[7:77])
    assert (tmp_path / "new" / "empty").read_bytes() == b"head"
    assert digests == {
        "other": hashlib.sha256(written).hexdigest(),
        "empty": hashlib.sha256(b"head").hexdigest(),
    }


def test_an_edit_is_prepared_once_and_sees_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "BLOCK", 30)
    (tmp_path / "one").write_bytes(bytes(100))
    edit = Inversion()
    part = Part(0, 100, StoredBytes(tmp_path / "one", 0, 100), edit, columns=10)
    assert write_files([NewFile("other", [part])], tmp_path, workers=2) == {}
    assert (edit.prepared, edit.firsts) == (1, [0, 3, 6, 9])


def test_copies_that_follow_each_other_are_one(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    parts = [copied(one, 10, 20), copied(one, 0, 10), copied(one, 20, 20), copied(other, 20, 30), copied(one, 40, 50)]
    assert copies(parts) == [copied(one, 0, 20), copied(other, 20, 30), copied(one, 40, 50)]
    assert len(copies([copied(one, 0, 10, place=5), copied(one, 10, 20)])) == 2


def test_a_source_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(10))
    for part in (copied(tmp_path / "one", 0, 20), inverted(tmp_path / "one", 0, 20, 5)):
        with pytest.raises(CheckpointError, match=r"one has become shorter while it is read"):
            write_files([NewFile("other", [part])], tmp_path, workers=1)
        (tmp_path / "other").unlink()


def test_a_kept_descriptor_reads_what_was_there(tmp_path: Path) -> None:
    """Another file in the place of one that is open is not read."""
    file = tmp_path / "one"
    file.write_bytes(b"before")
    with rewriting.opened_for_reading(file) as handle:
        (tmp_path / "two").write_bytes(b"after!")
        (tmp_path / "two").replace(file)
        values = np.empty(6, np.uint8)
        StoredBytes(file, 0, 6, handle=handle).read_into(values)
        assert values.tobytes() == b"before"
        StoredBytes(file, 0, 6).read_into(values)
        assert values.tobytes() == b"after!"
