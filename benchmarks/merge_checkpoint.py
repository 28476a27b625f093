"""Folding an adapter into a model's files: time compared with copying the files, and memory.

The model is a Llama of TinyLlama's shape with random weights and all projections adapted. A copy and a merge alternate
in one process; memory is measured in a separate process, beyond its imports.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from benchmarks.harness import Case, Claim, Report, Table, measure, progress, remove
from benchmarks.streaming import LLAMA, described, peak_memory, write_adapter, write_model
from gralora_fx.exporters import merge_checkpoint

_ITERATIONS = 7
_LARGEST = 2 * 32000 * 2048  # bytes of the embedding in bfloat16
MB = 2**20


def run() -> Report:
    """Copy and merge in turns, then measure the memory of one merge."""
    report = Report("merge-checkpoint", "merge-checkpoint: GraLoRA, r=32 k=2, on every projection of 1.1 B parameters")
    with tempfile.TemporaryDirectory(prefix="gralora-merge-") as scratch:
        root = Path(scratch)
        progress("merge-checkpoint, writing the shards")
        count = write_model(root / "base", LLAMA)
        write_adapter(root / "adapter", LLAMA)
        progress("merge-checkpoint, copying and merging")
        names = ("copy", "merge")
        cases = [
            _writing("copy", lambda path: shutil.copytree(root / "base", path), root / "copy"),
            _writing("merge", lambda path: merge_checkpoint(root / "base", root / "adapter", path), root / "merged"),
        ]
        timings = measure(cases, iterations=_ITERATIONS, warmup=1)
        progress("merge-checkpoint, memory")
        extra = _memory(root)
    report.tables.append(Table(described(count), [timings.row(name, "copy") for name in names]))
    largest = _LARGEST / MB
    report.tables.append(Table("memory", [{"peak beyond imports, MB": extra / MB, "largest tensor, MB": largest}]))
    report.claims.append(Claim("time / time to copy the files", timings.ratio(*names[::-1]).of_medians, at_most=1.5))
    report.claims.append(Claim("peak memory beyond the largest tensor, in MB", extra / MB - largest, at_most=64))
    report.notes.append("copy: shutil.copytree; both write to the same disk, whose writing may take most of the time")
    return report


def _writing(name: str, write: Callable[[Path], object], path: Path) -> Case[Path]:
    """Return a case that writes a directory, which is removed after each run."""

    def removed(written: Path) -> Path:
        remove(written)
        return written

    return Case(name, write, lambda: path, removed)


def _memory(root: Path) -> int:
    """Return the peak memory of one merge in bytes, beyond the process's imports."""
    code = "from benchmarks.merge_checkpoint import merge_alone; merge_alone()"
    arguments = [str(root / name) for name in ("base", "adapter", "alone")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return int(result["peak"] - result["imports"])


def merge_alone() -> None:
    """Run a merge and print the peak memory in bytes before and after; called in the other process."""
    import_module("transformers.models.llama.modeling_llama")
    imports = peak_memory()
    merge_checkpoint(*sys.argv[1:])
    print(json.dumps({"imports": imports, "peak": peak_memory()}))
