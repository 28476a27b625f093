"""FSDP2 over the blocks of a rewritten model: two processes train what one does, and save the same adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
TRAINED = 1e-5  # the rounding of several steps; a single gradient is held to 1e-6


def trained(output: Path, processes: int, adapters: Path) -> dict[str, Any]:
    """Train in processes of torchrun, resume from a folder of adapters, and return what was found."""
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(TESTS / "model" / "sharded_steps.py"), str(output), str(adapters)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((output / "found.json").read_text())
    return found


def difference(one: Path, other: Path) -> float:
    """Return the largest relative difference of the tensors of two adapters, whose configurations must be equal."""
    assert (one / "adapter_config.json").read_text() == (other / "adapter_config.json").read_text()
    first, second = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max() / first[key].abs().max()) for key in first)


def test_two_processes_train_as_one_and_a_checkpoint_of_either_resumes_in_the_other(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    found_of_two = trained(two, 2, adapters=two)
    trained(one, 1, adapters=two)
    assert difference(two / "accelerate", two / "gathered") == 0
    for method, found in found_of_two.items():
        assert found["gradients"] <= 1e-6, method
        assert found["base"] <= 1e-6, method
        assert found["loaded"] <= 1e-6, method
        assert found["tokens"] == 5, method
        assert difference(one / method, two / method) <= TRAINED, method
        assert difference(two / method, two / f"{method}-again") == 0, method
    assert difference(one / "resumed" / "gralora", two / "resumed" / "gralora") <= TRAINED
    assert difference(one / "resumed" / "gralora", two / "gralora") > 1e-4
