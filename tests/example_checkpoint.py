"""The checkpoint that `examples/peft_to_onnx.py` trains and an export of it, made once in a run of the tests."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Callable
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
    shutil.copytree(_made(factory, "example_checkpoint", runpy.run_path(str(EXAMPLE))["make_checkpoint"]), folder)


def copy_export(factory: pytest.TempPathFactory, folder: Path) -> None:
    """Copy an export of the checkpoint whose adapter is data; the worker that first asks for it makes it.

    Args:
        factory: Names the folder of the run.
        folder: Where the copy is made.
    """

    def export(made: Path) -> None:
        from transformers import AutoModelForCausalLM  # here, since tests that only read pages import this module

        from gralora_fx import GraloraModel, trace
        from gralora_fx.exporters import export_onnx

        copy_checkpoint(factory, made / "checkpoint")
        base = AutoModelForCausalLM.from_pretrained(made / "checkpoint" / "base")
        traced = trace(base, task="text-generation-with-past")
        gralora = GraloraModel.from_pretrained(traced, made / "checkpoint" / "adapter")
        export_onnx(gralora, made / "onnx", adapters="data", tokenizer=made / "checkpoint" / "base", verify=False)

    shutil.copytree(_made(factory, "example_export", export) / "onnx", folder)


def _made(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder of this name that the workers of a run share, filled by the first that asks for it."""
    run = factory.getbasetemp()
    run = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    made = run / name
    with FileLock(run / f"{name}.lock"):
        if not made.is_dir():
            make(run / f"{name}_at_work")
            (run / f"{name}_at_work").rename(made)
    return made
