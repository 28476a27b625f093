"""Distributions: the wheel holds the packages of the tree and their files, the source distribution all else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"gralora_fx": "gralora_fx", "exporters": "gralora_fx/exporters"}  # of the tree, and where they are installed
BUILD = "from setuptools import build_meta; build_meta.build_wheel({0!r}); build_meta.build_sdist({0!r})"
NEVER = ("__pycache__", ".ruff_cache", ".mypy_cache")


def files_of_packages() -> Iterator[str]:
    """Yield each file of the packages, but pages for readers of the tree, by its place in the wheel.

    The link to the exporters is not followed.
    """
    for folder, installed in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.name != "README.md" and not set(path.parts) & set(NEVER):
                yield f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the source distribution, built from a copy without what git ignores."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
        elif path.name in (*FOLDERS, "benchmarks", "docs", "examples", "tests"):
            ignored = shutil.ignore_patterns(*NEVER, "node_modules", "results")
            shutil.copytree(path, tree / path.name, symlinks=True, ignore=ignored)
    command = [sys.executable, "-c", BUILD.format(str(built))]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "_Warning" not in done.stderr, done.stderr
    return built


def test_the_wheel_holds_the_packages_of_the_tree_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(files_of_packages())
    assert {"gralora_fx/py.typed", "gralora_fx/exporters/onnx.py", "gralora_fx/picture/page.html.j2"} <= set(names)
    assert {"gralora_fx/cli/__main__.py", "gralora_fx/service/page/index.html"} <= set(names)
    about = {name.split("/", 1)[1] for name in names if ".dist-info/" in name}
    assert about == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


def test_the_source_distribution_holds_what_builds_tests_and_documents_it(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {name.replace("gralora_fx/exporters/", "exporters/") for name in files_of_packages()}
    assert sources <= names
    at_the_root = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert at_the_root <= names
    for folder in ("benchmarks", "docs", "examples", "tests"):
        paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and not path.name.startswith(".")]
        parts = ("node_modules", "results", *NEVER)
        here = {path.relative_to(ROOT).as_posix() for path in paths if not set(path.parts) & set(parts)}
        assert here <= names


def test_the_licence_is_apaches_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="ascii")
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert re.findall(r"^   (\d)\. ", text, re.MULTILINE) == list("123456789")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def test_the_changelog_has_the_version_and_its_date() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    groups = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # Keep a Changelog 1.1.0
