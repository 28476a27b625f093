"""Clients of the HTTP service, each in an environment of its own: the pins of one concern nobody else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPTS, BUILD = ROOT / "tests" / "clients", ROOT / "build" / "clients"
DEPLOY, CONSTRAINTS = ROOT / "examples" / "deploy", ROOT / "docs" / "constraints" / "0.1.0.txt"


def environment(client: str) -> Path:
    """Return the interpreter of a client's environment, made once a state of its lock file, by one process at a time.

    Args:
        client: The client, as its lock file is called.
    """
    return _environment(client, SCRIPTS / f"{client}.txt", "--no-deps")


def runtime() -> Path:
    """Return the interpreter of an environment with the project and its runtime's needs, as the image has them."""
    python = _environment("runtime", DEPLOY / "runtime.txt", "--constraint", str(CONSTRAINTS))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        for name in ("gralora_fx", "exporters"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        _run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"], folder)
        (wheel,) = Path(folder).glob("*.whl")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        _run([*pip, "--no-compile", "--force-reinstall", str(wheel)])
    return python


def _environment(name: str, requirements: Path, *options: str) -> Path:
    place, wanted = BUILD / name, requirements.read_text()
    python, installed = place / "bin" / "python", place / "installed.txt"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed.is_file() or installed.read_text() != wanted:
            shutil.rmtree(place, ignore_errors=True)
            _run([sys.executable, "-m", "venv", "--without-pip", str(place)])
            pip = [sys.executable, "-m", "pip", "--python", str(place), "install", "--quiet", *options]
            _run([*pip, "--no-compile", "--requirement", str(requirements)])
            installed.write_text(wanted)
    return python


def run_client(client: str, *arguments: str) -> Any:
    """Run a client's script and return what it prints last, as JSON.

    Args:
        client: The client.
        arguments: The script's arguments.
    """
    script = SCRIPTS / f"{client}_client.py"
    return json.loads(_run([str(environment(client)), "-W", "ignore", str(script), *arguments]).splitlines()[-1])


def _run(command: list[str], folder: str | None = None) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own, timeout=600, cwd=folder)
    assert done.returncode == 0, f"{command[0]} failed: {done.stderr[-3000:]}"
    return done.stdout
