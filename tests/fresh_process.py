"""Imports and output of a fresh interpreter at each step, from a tokenizer to a trained model: one process a run."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_once import made_once
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer

TESTS = Path(__file__).parent
_PROGRAM = """
import json, runpy, sys

folder, tests, example = sys.argv[1:]
from gralora_fx.core.loading.tokenizers import load_tokenizer
assert load_tokenizer(folder) is not None
after_tokenizer = list(sys.modules)

import gralora_fx.core.tracing.decoder_operators
from transformers import AttentionInterface, AttentionMaskInterface
registered = [name for each in (AttentionInterface(), AttentionMaskInterface()) for name in each if "gralora" in name]

sys.path.insert(0, tests)
from tiny_models import tiny_model
from gralora_fx import trace
model = tiny_model("llama", num_hidden_layers=1)
before = set(sys.modules)
trace(model)
traced = [name for name in sys.modules if ".modeling_" in name and name not in before]

with open(f"{folder}/found.json", "w") as file:
    json.dump({"after_tokenizer": after_tokenizer, "registered": registered, "imported_by_trace": traced}, file)
runpy.run_path(example, run_name="__main__")
"""


@dataclass(frozen=True)
class FreshProcess:
    """The imports and output of a fresh interpreter.

    Attributes:
        after_tokenizer: The modules after the tokenizer of a BERT was loaded, which is first.
        registered: What the package has registered with transformers before anything is traced.
        imported_by_trace: The modules of models that the trace of a Llama imported.
        stdout: What the process printed: the output of `examples/quickstart.py`, which runs last.
        stderr: What it printed there, to its end.
        status: How it ended.
    """

    after_tokenizer: list[str]
    registered: list[str]
    imported_by_trace: list[str]
    stdout: str
    stderr: str
    status: int


@functools.cache
def fresh_process() -> FreshProcess:
    """Return what the process of this run found."""
    folder = made_once("fresh-process", _run)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return FreshProcess(**found, **json.loads((folder / "ended.json").read_text()))


def _run(folder: Path) -> None:
    tiny_model("bert").config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    command = [sys.executable, "-c", _PROGRAM, folder, TESTS, TESTS.parent / "examples" / "quickstart.py"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=TESTS.parent)
    assert (folder / "found.json").is_file(), ended.stderr
    printed = {"stdout": ended.stdout, "stderr": ended.stderr, "status": ended.returncode}
    (folder / "ended.json").write_text(json.dumps(printed))
