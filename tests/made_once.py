"""Folders that several tests read, made once a run, whichever worker needs one first."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

PLACE = "TESTS_MADE_ONCE"  # of the run, which workers inherit


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder that `make` filled, for tests to read, or to copy if they change it.

    Args:
        name: The folder's name, which says all that `make` depends on.
        make: Fills an empty folder.
    """
    place = Path(os.environ[PLACE]) / name
    with place.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.is_dir():
            begun = place.with_name(f"{name}.begun")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir()
            make(begun)
            begun.rename(place)
    return place
