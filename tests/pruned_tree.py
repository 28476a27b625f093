"""A copy of the package without some features, and programs that run on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def copy_without(folder: Path, *features: str) -> Path:
    """Copy the package, so that programs run without some features.

    Args:
        folder: Where the copy is made.
        features: Names of the features' folders.
    """
    for name in ("gralora_fx", "exporters"):  # the first links to the second
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    for feature in features:
        shutil.rmtree(folder / "gralora_fx" / "features" / feature)
    return folder


def run_on(tree: Path, program: str, *arguments: object) -> str:
    """Run a program on a copy, beside the modules of the tests, and return what it printed.

    Args:
        tree: The copy.
        program: Python code.
        *arguments: What it is given in `sys.argv`.
    """
    path = os.pathsep.join(map(str, (tree, ROOT / "tests")))
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=tree)
    assert done.returncode == 0, done.stderr
    return done.stdout
