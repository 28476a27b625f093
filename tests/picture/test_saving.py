"""Pictures as files, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from traces import traced

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.errors import RewriteError
from gralora_fx.picture import html_of, svg_of


@pytest.fixture(scope="module")
def model() -> GraloraModel:
    return rewrite(traced("bert"), GraloraConfig(r=8, target_modules=["query"]))


def test_a_model_draws_itself_into_a_file(model: GraloraModel, tmp_path: Path) -> None:
    model.to_svg(tmp_path / "new" / "model.svg")
    model.to_html(str(tmp_path / "model.html"))
    assert (tmp_path / "new" / "model.svg").read_text() == svg_of(model)
    assert (tmp_path / "model.html").read_text() == html_of(model)
    ElementTree.parse(tmp_path / "new" / "model.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.html", "new"]


def test_a_picture_replaces_an_older_file_whole(model: GraloraModel, tmp_path: Path) -> None:
    target = tmp_path / "model.svg"
    target.write_text("older")
    model.to_svg(target)
    assert target.read_text() == svg_of(model)


def test_what_cannot_be_written_is_named(model: GraloraModel, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RewriteError, match=r"cannot write .*folder \(Is a directory\); give the path of a file"):
        model.to_svg(tmp_path / "folder")
    with pytest.raises(RewriteError, match=r"cannot write .*model.svg \(.*\); give the path of a file"):
        model.to_svg(tmp_path / "file" / "model.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
