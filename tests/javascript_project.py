"""The Node project of `tests/javascript/`, installed where a test may run it."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE, BUILD = ROOT / "tests" / "javascript", ROOT / "build" / "javascript"
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None,
    reason="Node 20 or later with npm is needed, and one of them is not on the path",
)


def installed_project() -> Path:
    """Return the project with its packages, installed once a state of its lock file, by one process at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    wanted, installed = (SOURCE / "package-lock.json").read_text(), BUILD / "installed.json"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in SOURCE.iterdir():
            shutil.copy(path, BUILD / path.name)
        if not installed.is_file() or installed.read_text() != wanted:
            done = subprocess.run(["npm", "ci"], cwd=BUILD, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"npm ci failed: {done.stderr}"
            installed.write_text(wanted)
    return BUILD


def run_script(project: Path, *arguments: str) -> Any:
    """Run a script of the project and return what it prints last, as JSON."""
    done = subprocess.run(["node", *arguments], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
