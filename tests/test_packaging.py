"""What is installed: every package of the source tree, with the files beside its modules."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"gralora_fx": ROOT / "gralora_fx", "gralora_fx.exporters": ROOT / "exporters"}


def packages() -> Iterator[tuple[str, Path]]:
    """The packages of the source tree, each with its folder; the link to the exporters is not followed."""
    for name, folder in FOLDERS.items():
        for file in sorted(folder.rglob("__init__.py")):
            yield ".".join([name, *file.parent.relative_to(folder).parts]), file.parent


def test_every_package_is_installed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(name for name, _ in packages())


def test_every_file_beside_the_modules_is_installed() -> None:
    patterns: dict[str, list[str]] = SETUPTOOLS["package-data"]
    homes = dict(packages())
    for name, folder in FOLDERS.items():
        for file in folder.rglob("*"):
            if not file.is_file() or file.suffix in (".py", ".pyc"):
                continue
            home = max((n for n, path in homes.items() if file.is_relative_to(path) and n.startswith(name)), key=len)
            relative = file.relative_to(homes[home]).as_posix()
            assert any(fnmatch(relative, pattern) for pattern in patterns.get(home, [])), f"{home} lacks {relative}"
