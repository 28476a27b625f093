"""A feature is one folder: known by its record, described by a page, imported by nothing outside."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from source_files import NAMES, faults, nodes
from test_import_order import imported

from benchmarks.loaded_files import APART, NAMED, NAMED_OUTSIDE, naming
from gralora_fx import features as package
from gralora_fx.base import features as found
from gralora_fx.base.features import POINTS, Feature, features

pytestmark = pytest.mark.quick

FOLDER = Path(package.__file__).parent
LONGEST = 2_200  # lines of a feature's folder
LONGER = {"images": 4_250}  # decoders and towers of vision-language models, files of strangers, requests
every_feature = pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)


def test_nothing_outside_imports_a_feature() -> None:
    outside = (file for name, file in NAMES.items() if not name.startswith("features."))
    assert faults(outside, lambda file: [other for other in imported(file) if other.startswith("features.")]) == {}


def test_features_do_not_import_each_other() -> None:
    for name in (name for name in NAMES if name.startswith("features.")):
        own = ".".join(name.split(".")[:2])
        others = [other for other in imported(NAMES[name]) if other.startswith("features.")]
        assert [other for other in others if not f"{other}.".startswith(f"{own}.")] == [], name


@every_feature
def test_every_part_is_of_a_known_point_and_there(feature: Feature) -> None:
    assert feature.parts.keys() <= POINTS.keys()
    for point in feature.parts:
        assert feature.part(point) is not None


@every_feature
def test_a_feature_is_named_as_its_folder_which_has_a_page_and_is_short(feature: Feature) -> None:
    folder = FOLDER / feature.name
    assert len((folder / "README.md").read_text(encoding="utf-8").splitlines()) <= 60
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in folder.rglob("*.py")) <= LONGER.get(
        feature.name, LONGEST
    )


@pytest.mark.parametrize("feature", APART)
def test_few_files_outside_its_folder_name_a_feature(feature: str) -> None:
    files = list(naming(feature, NAMED[feature]))
    assert len(files) <= NAMED_OUTSIDE, files


def points_asked_for(file: Path) -> Iterator[str]:
    """Yield the points of a module's calls of `parts`."""
    imports = [
        node for node in nodes(file) if isinstance(node, ast.ImportFrom) and node.module == "gralora_fx.base.features"
    ]
    names = {alias.asname or alias.name for node in imports for alias in node.names if alias.name == "parts"}
    for node in nodes(file):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            assert isinstance(node.args[0], ast.Constant)
            yield str(node.args[0].value)


def test_every_point_is_asked_for_by_a_stage() -> None:
    assert POINTS.keys() == {point for file in NAMES.values() for point in points_asked_for(file)}


def test_threads_that_ask_at_once_find_each_feature_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, read = [feature.name for feature in features()], found._read

    def slowly(file: Path) -> Feature:
        time.sleep(0.001)
        return read(file)

    monkeypatch.setattr(found, "_FEATURES", [])
    monkeypatch.setattr(found, "_read", slowly)
    with ThreadPoolExecutor(4) as pool:
        names = [pool.submit(lambda: [feature.name for feature in features()]) for _ in range(4)]
        assert all(each.result() == expected for each in names)
    assert [feature.name for feature in features()] == expected
