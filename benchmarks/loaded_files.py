"""The project's files that a process has loaded after a job, and the files that name a feature.

Each job runs in its own interpreter. A loaded file is in `sys.modules`; a reader who follows the job may have to open
it. Models are created within the process, so that only the job counts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Claim, Report, Table, progress

_ROOT = Path(__file__).parents[1]
_SOURCE = ("gralora_fx", "exporters")
_FEATURES = "gralora_fx/features"

_LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
traced = trace(model, task="text-generation-with-past")
"""
_BEGIN = "from gralora_fx import GraloraConfig, merge, rewrite, trace\n"
_MERGE = "merged = merge(rewrite(traced, GraloraConfig(r=4, gralora_k=2, target_modules={targets})))\n"
_TWO_LAYERS = """
import torch
network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
traced = trace(network, (torch.randn(2, 8),))
"""
_EXPORT = "from gralora_fx.exporters import export_onnx\nexport_onnx(merged, directory)\n"
_GENERATE = """
from gralora_fx.serving import load
load(directory).generate([[1, 2, 3]], max_new_tokens=2)
"""
_END = """
import json, os, sys
files = {os.path.realpath(module.__file__) for name, module in list(sys.modules.items())
         if name.partition(".")[0] == "gralora_fx" and getattr(module, "__file__", None)}
print(json.dumps(sorted(files)))
"""


@dataclass(frozen=True)
class Job:
    """A job whose loaded files are counted."""

    name: str
    program: str  # the code; `directory` is the path of an export that it may write or read
    files: int  # maximum of loaded files
    lines: int  # maximum of their lines


_MERGED_LLAMA = _BEGIN + _LLAMA + _MERGE.format(targets="'all-linear'")
JOBS = (
    Job("trace, rewrite, merge: two layers", _BEGIN + _TWO_LAYERS + _MERGE.format(targets="['0']"), 72, 11_350),
    Job("trace, rewrite, merge: Llama", _MERGED_LLAMA, 90, 13_850),
    Job("export: Llama, merged, verified", _MERGED_LLAMA + _EXPORT, 168, 26_000),
    Job("load and generate", _GENERATE, 54, 7_450),  # the export that the job before it wrote
)
NAMED = {
    "activated": r"(?<![rq])alora|activated (adapter|lora)",
    "experts": "expert",
    "quantization": "quantiz",
    "images": r"(?<!input_)image(?!/svg|_url)|pixel",  # a type in HTTP and a field of OpenAI's are of another kind
    "speech": r"speech|audio|whisper|\brecordings?\b",  # a span's `is_recording` is OpenTelemetry's
    "tools": r"(?<!\w)tool(s?\b|_|call|choice|use)|function_call",
    "structured_outputs": r"\bgrammars?\b|structured.?output|llguidance|guided_|form of (the|an) answer",
    "speculation": r"draft_tokens|speculat|prompt_lookup_num_tokens[:=]",  # the name alone is transformers' too
    "nf4": "nf4",
    "sentences": r"sentence[_-]?(transformer|encoder|embedding|modules|similarity)|sentence encoder",
    "states": "linear_?attention|state.?space|recurrence|mamba|causal_?conv",
}
APART = (
    "activated",
    "experts",
    "images",
    "nf4",
    "sentences",
    "speculation",
    "speech",
    "states",
    "structured_outputs",
    "tools",
)  # features that hardly any other file names
NAMED_OUTSIDE = 3  # files outside its folder that may name a feature


def add_to(report: Report) -> None:
    """Add the tables of loaded files and of files that name a feature, and their claims."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            progress(f"structure, {job.name}")
            files = loaded(job.program, Path(folder, "export"))
            lines = sum(_length(file) for file in files)
            rows.append({"job": job.name, "files": len(files), "lines": lines})
            report.claims.append(Claim(f"{job.name}: files loaded", len(files), at_most=job.files))
            report.claims.append(Claim(f"{job.name}: lines loaded", lines, at_most=job.lines))
    report.tables.append(Table("loaded", rows))
    named = {feature: list(naming(feature, word)) for feature, word in NAMED.items()}
    report.tables.append(Table("files outside its folder that name a feature", [_row(*item) for item in named.items()]))
    for feature in APART:
        report.claims.append(Claim(f"files that name {feature}", len(named[feature]), at_most=NAMED_OUTSIDE))


def loaded(program: str, directory: Path) -> list[Path]:
    """Return the project's files that a process has loaded after running a program, which knows a `directory`."""
    code = f"directory = {str(directory)!r}\n{program}{_END}"
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=_ROOT)
    if result.returncode:
        raise RuntimeError(f"the program failed: {result.stderr.strip()[-2000:]}")
    return [Path(file) for file in json.loads(result.stdout.splitlines()[-1])]


def naming(feature: str, word: str) -> Iterator[Path]:
    """Yield the files outside a feature's folder that match an expression, whatever the case."""
    for folder in _SOURCE:
        for file in sorted((_ROOT / folder).rglob("*.py")):
            path = file.relative_to(_ROOT)
            if not path.is_relative_to(f"{_FEATURES}/{feature}") and re.search(word, file.read_text(), re.IGNORECASE):
                yield path


def _row(feature: str, files: list[Path]) -> dict[str, Any]:
    return {"feature": feature, "files": len(files), "folders": len({file.parent for file in files})}


def _length(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())
