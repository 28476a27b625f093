"""The checkpoint that `examples/peft_to_onnx.py` trains, made once in a run of the tests."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

EXAMPLE = Path(__file__).parent.parent / "examples" / "peft_to_onnx.py"


def copy_checkpoint(factory: pytest.TempPathFactory, folder: Path) -> None:
    """Copy the checkpoint, folders `base` and `adapter`; the worker that first asks for it trains it.

    Args:
        factory: Names the folder of the run.
        folder: Where the copy is made.
    """
    run = factory.getbasetemp()
    run = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run  # which the workers share
    made = run / "example_checkpoint"
    with FileLock(run / "example_checkpoint.lock"):
        if not made.is_dir():
            runpy.run_path(str(EXAMPLE))["make_checkpoint"](run / "example_checkpoint_at_work")
            (run / "example_checkpoint_at_work").rename(made)
    shutil.copytree(made, folder)
